// What the sources of op_bench share: the device under test, operands on it, the timed loop and
// the report. A process has one thread that benches.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ceilings.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace trireme {

struct Bench {
  std::unique_ptr<Device> device;
  // The same GPU, opened with DeviceOptions.cublas_lt: on `device` room for matmuls is for its own
  // kernels. Null where there is none.
  std::unique_ptr<Device> cublas_lt_device;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Stream> cublas_lt;  // of cublas_lt_device, or null
  std::unique_ptr<Stream> no_room;    // a GPU's, without room for any matmul; else null
  Ceilings ceilings;
};
extern Bench* bench;  // set by main before anything is registered

template <typename T>
T Ok(absl::StatusOr<T> result) {
  CHECK(result.ok()) << result.status().ToString();
  return std::move(result).value();
}

// Small values of either sign, so that no matmul overflows or meets denormals.
std::vector<char> FillHost(DType dtype, int64_t n);
Tensor Upload(DType dtype, Shape shape, const void* data);
Tensor Filled(DType dtype, Shape shape);
Tensor Integers(const std::vector<int32_t>& values);

// Runs `op` for the benchmark; a queue is kept filled, and waited for at the end.
template <typename Op>
void Measure(benchmark::State& state, Stream& stream, Op&& op) {
  constexpr int kBatch = 20;
  op();
  CHECK(stream.Synchronize().ok());
  while (state.KeepRunningBatch(kBatch)) {
    for (int i = 0; i < kBatch; ++i) op();
    CHECK(stream.Synchronize().ok());
  }
}
template <typename Op>
void Measure(benchmark::State& state, Op&& op) {
  Measure(state, *bench->stream, std::forward<Op>(op));
}

// Rates by `cost`, and % of the ceilings; `dtype` is what the arithmetic is done in.
void Report(benchmark::State& state, const OpCost& cost, DType dtype);

// Linear layers (op_bench_matmul.cc).
void RegisterMatMuls();
// Norms, activations, sums, look-ups, penalties (op_bench_rows.cc).
void RegisterRowOps();
// Embedding, RoPE and the KV store, sampling (op_bench_tokens.cc).
void RegisterTokenOps();

}  // namespace trireme
