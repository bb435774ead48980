// The CPU backend's ops as the op table wants them, and the stream behind them. Internal to
// kernels/cpu.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/device.h"
#include "kernels/op_table.h"
#include "kernels/ops.h"

namespace trireme::cpu {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int threads);
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override;
  ThreadPool& pool() { return pool_; }

 private:
  ThreadPool pool_;
};

// REQUIRES: a stream of a CpuDevice; the op table makes sure.
inline ThreadPool& PoolOf(Stream& stream) {
  return static_cast<CpuDevice&>(stream.device()).pool();
}

// Rows a thread takes at a time, so that a chunk is worth waking a worker (1 to 5 us): 16 K
// elements, about 2 us.
inline int64_t RowGrain(int64_t elements_per_row) {
  constexpr int64_t kChunkElements = 16384;
  return elements_per_row >= kChunkElements
             ? 1
             : kChunkElements / (elements_per_row > 0 ? elements_per_row : 1);
}

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
void Embedding(Stream&, ConstTensorView token_ids, const LinearWeight& table, int64_t vocab_begin,
               TensorView out);
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
absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream&, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use,
                                                             const float* row_maxima);

}  // namespace trireme::cpu
