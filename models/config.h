// ModelConfig: config.json of a Hugging Face decoder checkpoint as plain fields. Config decides,
// not subclasses: Llama 2/3, Mistral, Qwen2, Qwen3 and StarCoder2 are combinations of these fields.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"
#include "kernels/norm.h"

namespace trireme {

// Llama-3 frequency scaling (transformers modeling_rope_utils, "llama3"); factor 1 = plain RoPE.
struct RopeScaling {
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 0;
};

enum class MlpKind : uint8_t {
  kSwiGlu,  // down(silu(gate(x)) * up(x))
  kGelu,    // down(gelu(up(x)))
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", ...
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;  // its own in Qwen3, else hidden_size / num_heads
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  NormKind norm = NormKind::kRms;  // kLayer: with a bias
  double norm_eps = 1e-5;
  MlpKind mlp = MlpKind::kSwiGlu;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool qkv_bias = false;     // Qwen2, or attention_bias, or use_bias
  bool output_bias = false;  // attention_bias of Llama, and use_bias, put one on o_proj too
  bool mlp_bias = false;
  bool qk_norm = false;                   // Qwen3
  bool tied_head = false;                 // lm_head is the embedding
  int64_t sliding_window = 0;             // 0 = none
  int64_t sliding_window_from_layer = 0;  // Qwen2: layers below max_window_layers see everything
  DType dtype = DType::kF32;              // torch_dtype
  int64_t bos_token_id = -1;              // -1 = none
  std::vector<int64_t> eos_token_ids;

  int64_t SlidingWindow(int64_t layer) const {
    return layer >= sliding_window_from_layer ? sliding_window : 0;
  }
};

// Parses the text of config.json; `name` is what error lines call the file. Sizes are bounded
// (absurd ones are refused with the field's name) so that no later arithmetic overflows.
absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& json, const std::string& name);
// Reads DIR/config.json, and eos_token_id of DIR/generation_config.json when it is there.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir);

// Angular frequency of each of the head_dim / 2 rotated pairs, with the scaling applied.
std::vector<double> RopeFrequencies(const ModelConfig& config);

}  // namespace trireme
