// The CUDA backend's ops as the op table wants them, and the stream behind them. Internal to
// kernels/cuda and to the emulator's device in tests/host_cuda.
#pragma once

#include <vector>

#include "kernels/cuda/gpu.h"
#include "kernels/device.h"
#include "kernels/op_table.h"

namespace trireme::cuda {

extern const OpTable kOps;

// The device's own handle of a stream whose op table is kOps; each device defines it.
gpu::StreamHandle NativeHandle(Stream& stream);

void Embedding(Stream&, ConstTensorView token_ids, const LinearWeight& table, int64_t vocab_begin,
               TensorView out);
void Norm(Stream&, ConstTensorView x, const NormParams& norm, TensorView out);
void AddNorm(Stream&, TensorView residual, ConstTensorView delta, const NormParams& norm,
             TensorView out);
void Add(Stream&, TensorView x, ConstTensorView delta);
void Gelu(Stream&, TensorView x);
void SiluAndMul(Stream&, ConstTensorView gate_up, TensorView out);
void GatherRows(Stream&, ConstTensorView x, ConstTensorView indices, TensorView out);
void RopeAndStoreKv(Stream&, TensorView qkv, ConstTensorView positions,
                    ConstTensorView slot_mapping, const RopeParams& rope, int64_t q_heads,
                    const PagedKv& kv);
void PagedAttention(Stream&, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out);
int64_t AttentionWorkspaceBytes(const AttentionLimits& limits);
void MatMul(Stream&, ConstTensorView x, const LinearWeight& w, ConstTensorView bias, TensorView y);
void MatMulSwiGlu(Stream&, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                  TensorView y);
void MatMulGelu(Stream&, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y);
void PenalizeLogits(Stream&, TensorView logits, ConstTensorView count, ConstTensorView places,
                    ConstTensorView amounts, TensorView before);
void SummarizeLogits(Stream&, ConstTensorView logits, ConstTensorView inverse_temperature,
                     ConstTensorView counts, TensorView largest, TensorView sum, TensorView scores,
                     TensorView columns);
void DrawTokens(Stream&, ConstTensorView logits, ConstTensorView seeds, ConstTensorView limits,
                ConstTensorView largest, int64_t first_id, TensorView keys, TensorView scores,
                TensorView columns);
void RestoreLogits(Stream&, ConstTensorView count, ConstTensorView places, ConstTensorView before,
                   const ShardAnswers& answers);
void ChooseTokens(Stream&, const ShardAnswers& first, int64_t shard_bytes, const ChoiceOfRows& rows,
                  const ChosenTokens& chosen);
absl::StatusOr<int64_t> ReserveMatMul(Stream&, int64_t rows,
                                      const std::vector<const LinearWeight*>& weights);
absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream&, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use,
                                                             const float* row_maxima);

// Row-major; stretches of 64 bytes in the order of matmul_launch.h where `permuted`. Behind e4m3
// what each row's sum of x q / 256 is to be times.
class CudaLinear final : public LinearWeight {
 public:
  Buffer buffer;
  bool permuted = false;
  // REQUIRES: dtype is e4m3.
  int64_t scales_at() const { return (n * k + 255) / 256 * 256; }
  const float* scales() const {
    return reinterpret_cast<const float*>(static_cast<const char*>(buffer.data()) + scales_at());
  }
};

}  // namespace trireme::cuda
