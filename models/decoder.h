// One pipeline stage of a decoder-only transformer on this tensor-parallel rank: Llama 2/3,
// Mistral, Qwen2, Qwen3, StarCoder2. The architecture is the config's fields; the forward pass is a
// page of ops in the paper's order (Touvron et al. 2023; the tensor-parallel cut is Megatron-LM's,
// Shoeybi et al. 2019, section 3). Used by one thread.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/quantize.h"
#include "models/batch.h"
#include "models/config.h"
#include "models/kv_cache.h"
#include "models/weights.h"
#include "parallel/process_groups.h"

namespace trireme {

struct DecoderOptions {
  DType dtype = DType::kF32;  // of weights that are not quantised, activations and KV cache
  Quantization quantization = Quantization::kNone;
  // With quantisation on several tensor-parallel ranks, the result of RowMaxima over all of them.
  std::vector<float> row_maxima;
  int64_t max_batch_tokens = 512;  // the largest T
  int64_t max_logit_rows = 64;     // the largest R
  int64_t max_sequences = 64;      // the largest S
  int64_t max_positions = 0;       // positions the rotation table covers
  int64_t max_kv_len = 0;          // positions a page table has room for; 0 = max_positions
  std::vector<int64_t> pp_split;   // layers of each stage; empty = balanced
  // Called now and then during Load with the checkpoint bytes this rank has read and will have read
  // in all, by one thread at a time; may be empty.
  std::function<void(int64_t bytes, int64_t total)> progress;
};

class Decoder {
 public:
  // Reads this rank's share of the checkpoint and packs it. `groups` must outlive the decoder.
  static absl::StatusOr<std::unique_ptr<Decoder>> Load(const ModelConfig& config,
                                                       const ProcessGroups& groups,
                                                       WeightLoader& loader, Stream& stream,
                                                       const DecoderOptions& options);

  // Quantised, a row of a linear layer has one scale whatever ranks it is cut over, so that all
  // layouts compute with the same weights. Those of o and down are cut: the largest magnitudes in
  // this rank's piece of each, [layers of this stage][o, down][H]. The caller takes the maximum
  // over the ranks.
  static absl::StatusOr<std::vector<float>> RowMaxima(const ModelConfig& config,
                                                      const ProcessGroups& groups,
                                                      WeightLoader& loader,
                                                      const std::vector<int64_t>& pp_split);

  // hidden [T, H] = the tokens' embeddings. First stage only.
  void Embed(Stream& stream, const Batch& batch, TensorView hidden);
  // hidden [T, H]: the residual stream, advanced by this stage's layers in place.
  void Forward(Stream& stream, const Batch& batch, const KvCache& kv, TensorView hidden);
  // The hidden states of the batch's logit rows behind the final norm, [R, H] act, in memory that
  // the next call writes to. Last stage only.
  ConstTensorView NormedRows(Stream& stream, const Batch& batch, ConstTensorView hidden);
  // logits [R, V / tp] f32 of the batch's logit rows: this rank's piece of the vocabulary. Last
  // stage only.
  void Logits(Stream& stream, const Batch& batch, ConstTensorView hidden, TensorView logits);

  Range layers() const { return layer_range_; }     // of the model
  Range vocabulary() const { return vocabulary_; }  // ids whose logits this rank computes
  int64_t kv_heads() const { return kv_heads_; }    // of this rank
  int64_t weight_bytes() const { return weight_bytes_; }
  // Arena and rotation table.
  int64_t activation_bytes() const {
    return static_cast<int64_t>(arena_.capacity()) + cos_sin_.bytes();
  }
  // Attention's, and what the stream holds for matmuls.
  int64_t workspace_bytes() const { return attention_workspace_.bytes() + matmul_workspace_bytes_; }
  const ModelConfig& config() const { return config_; }

 private:
  // [H] each; an RMSNorm has no bias.
  struct NormWeights {
    Tensor weight, bias;
  };
  struct Layer {
    NormWeights input_norm, post_norm;
    std::unique_ptr<LinearWeight> qkv;      // [(Hq + 2 Hkv) D, H]
    std::unique_ptr<LinearWeight> o;        // [H, Hq D]
    std::unique_ptr<LinearWeight> gate_up;  // [2 I, H], or without a gate [I, H]
    std::unique_ptr<LinearWeight> down;     // [H, I]
    Tensor qkv_bias, o_bias, gate_up_bias, down_bias;
    Tensor q_norm, k_norm;  // [D]
    AttentionShape attention;
  };
  class Builder;  // loads; in decoder_load.cc

  Decoder() = default;
  NormParams ParamsOf(const NormWeights& norm) const;
  // Each leaves this rank's part of delta [T, H]: the sum over ranks is the caller's.
  void Attention(Stream& stream, const Batch& batch, const Layer& layer, const PagedKv& kv,
                 ConstTensorView normed, TensorView delta);
  void Mlp(Stream& stream, const Layer& layer, ConstTensorView normed, TensorView delta);

  ModelConfig config_;
  const ProcessGroups* groups_ = nullptr;
  DType dtype_ = DType::kF32;
  Range layer_range_, vocabulary_;
  int64_t q_heads_ = 0, kv_heads_ = 0, intermediate_ = 0;
  int64_t embedding_begin_ = 0;
  int64_t weight_bytes_ = 0;
  std::shared_ptr<const LinearWeight> embedding_;  // [V / tp, H], first stage
  std::vector<Layer> layers_;
  NormWeights final_norm_;                    // last stage
  std::shared_ptr<const LinearWeight> head_;  // [V / tp, H], last stage; may be the embedding
  Tensor cos_sin_;                            // [max_positions, D] f32
  Arena arena_;                               // activations of one call
  Tensor attention_workspace_;                // empty where the device needs none
  int64_t matmul_workspace_bytes_ = 0;        // the stream's, of Load
};

}  // namespace trireme
