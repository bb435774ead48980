#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/checkpoint_maker.h"
#include "models/json_file.h"

namespace trireme {
namespace {

enum class Family { kLlama, kMistral, kQwen2, kQwen3, kStarcoder2 };

struct Recipe {
  const char* name;
  Family family;
  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, positions;
  double theta;
  double llama3_factor;  // 0 = plain RoPE
  bool tied;
  int64_t bos, eos;
};

constexpr Recipe kRecipes[] = {
    {"llama-3.2-1b", Family::kLlama, 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, 32, true,
     128000, 128001},
    {"llama-3.2-3b", Family::kLlama, 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, 32, true,
     128000, 128001},
    {"llama-3.1-8b", Family::kLlama, 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, 8, false,
     128000, 128001},
    {"llama-3.1-70b", Family::kLlama, 8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, 8, false,
     128000, 128001},
    {"qwen3-0.6b", Family::kQwen3, 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, 0, true, 151643,
     151645},
    {"qwen3-1.7b", Family::kQwen3, 2048, 6144, 28, 16, 8, 128, 151936, 40960, 1e6, 0, true, 151643,
     151645},
    {"qwen3-8b", Family::kQwen3, 4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, 0, false, 151643,
     151645},
    {"qwen2.5-0.5b", Family::kQwen2, 896, 4864, 24, 14, 2, 64, 151936, 32768, 1e6, 0, true, 151643,
     151643},
    {"qwen2.5-7b", Family::kQwen2, 3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, 0, false,
     151643, 151643},
    {"mistral-7b", Family::kMistral, 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, 0, false, 1,
     2},
    {"starcoder2-3b", Family::kStarcoder2, 3072, 12288, 30, 24, 2, 128, 49152, 16384,
     999999.4420358813, 0, true, 0, 0},
    {"tinyllama-1.1b", Family::kLlama, 2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4, 0, false, 1, 2},
};

ModelConfig ConfigOf(const Recipe& recipe) {
  ModelConfig config;
  switch (recipe.family) {
    case Family::kLlama:
      config.architecture = "LlamaForCausalLM";
      break;
    case Family::kMistral:
      config.architecture = "MistralForCausalLM";
      break;
    case Family::kQwen2:
      config.architecture = "Qwen2ForCausalLM";
      break;
    case Family::kQwen3:
      config.architecture = "Qwen3ForCausalLM";
      break;
    case Family::kStarcoder2:
      config.architecture = "Starcoder2ForCausalLM";
      config.norm = NormKind::kLayer;
      config.mlp = MlpKind::kGelu;
      config.output_bias = config.mlp_bias = true;
      config.sliding_window = 4096;
      break;
  }
  const bool qwen = recipe.family == Family::kQwen2 || recipe.family == Family::kQwen3;
  config.hidden_size = recipe.hidden;
  config.intermediate_size = recipe.intermediate;
  config.num_layers = recipe.layers;
  config.num_heads = recipe.heads;
  config.num_kv_heads = recipe.kv_heads;
  config.head_dim = recipe.head_dim;
  config.vocab_size = recipe.vocab;
  config.max_positions = recipe.positions;
  config.norm_eps = qwen ? 1e-6 : 1e-5;
  config.rope_theta = recipe.theta;
  if (recipe.llama3_factor > 0) config.rope_scaling = {recipe.llama3_factor, 1.0, 4.0, 8192};
  config.qkv_bias = recipe.family == Family::kQwen2 || recipe.family == Family::kStarcoder2;
  config.qk_norm = recipe.family == Family::kQwen3;
  config.tied_head = recipe.tied;
  config.dtype = DType::kBF16;
  config.bos_token_id = recipe.bos;
  config.eos_token_ids.assign(1, recipe.eos);
  return config;
}

}  // namespace

std::vector<std::string> CheckpointRecipeNames() {
  std::vector<std::string> names;
  for (const Recipe& recipe : kRecipes) names.push_back(recipe.name);
  return names;
}

absl::StatusOr<ModelConfig> CheckpointRecipeConfig(const std::string& like) {
  for (const Recipe& recipe : kRecipes) {
    if (like == recipe.name) return ConfigOf(recipe);
  }
  return absl::InvalidArgumentError(absl::StrCat("no model called ", Quoted(like),
                                                 " is known; known are ",
                                                 absl::StrJoin(CheckpointRecipeNames(), ", ")));
}

std::string ConfigJson(const ModelConfig& config) {
  nlohmann::ordered_json out;
  const std::string& architecture = config.architecture;
  out["architectures"] = {architecture};
  std::string type = architecture.substr(0, architecture.find("ForCausalLM"));
  std::transform(type.begin(), type.end(), type.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  out["model_type"] = type;
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["num_key_value_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["vocab_size"] = config.vocab_size;
  out["max_position_embeddings"] = config.max_positions;
  const bool starcoder2 = config.norm == NormKind::kLayer;
  out["hidden_act"] = starcoder2 ? "gelu_pytorch_tanh" : "silu";
  out[starcoder2 ? "norm_epsilon" : "rms_norm_eps"] = config.norm_eps;
  out["rope_theta"] = config.rope_theta;
  out["rope_scaling"] = nullptr;
  if (const RopeScaling& scaling = config.rope_scaling;
      scaling.original_max_position_embeddings > 0) {
    out["rope_scaling"] = {
        {"rope_type", "llama3"},
        {"factor", scaling.factor},
        {"low_freq_factor", scaling.low_freq_factor},
        {"high_freq_factor", scaling.high_freq_factor},
        {"original_max_position_embeddings", scaling.original_max_position_embeddings}};
  }
  if (starcoder2) {
    out["use_bias"] = config.mlp_bias;
  } else {
    out["attention_bias"] = config.output_bias;
    out["mlp_bias"] = config.mlp_bias;
  }
  if (config.sliding_window > 0) {
    out["sliding_window"] = config.sliding_window;
    out["use_sliding_window"] = true;
    out["max_window_layers"] = config.sliding_window_from_layer;
  }
  out["tie_word_embeddings"] = config.tied_head;
  out["torch_dtype"] = config.dtype == DType::kF32   ? "float32"
                       : config.dtype == DType::kF16 ? "float16"
                                                     : "bfloat16";
  if (config.bos_token_id >= 0) out["bos_token_id"] = config.bos_token_id;
  if (!config.eos_token_ids.empty()) out["eos_token_id"] = config.eos_token_ids;
  return out.dump(2) + "\n";
}

}  // namespace trireme
