#include "kernels/ceilings.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "kernels/cuda/cublas_lt_plans.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/read_bandwidth.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

// Seconds of one `work`, the best of several runs of `repeat`.
absl::StatusOr<double> BestSeconds(Stream& stream, int repeat,
                                   const std::function<absl::Status()>& work) {
  using Clock = std::chrono::steady_clock;
  RETURN_IF_ERROR(work());  // warms up
  RETURN_IF_ERROR(stream.Synchronize());
  double best = 1e30;
  for (int run = 0; run < 5; ++run) {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < repeat; ++i) RETURN_IF_ERROR(work());
    RETURN_IF_ERROR(stream.Synchronize());
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count() / repeat);
  }
  return best;
}

// Numbers of both signs and several sizes, as weights are: a chip multiplies zeros faster, for they
// take less power. A block from the host, then copies of what there is.
absl::Status FillWithNumbers(Stream& stream, const Tensor& tensor) {
  constexpr size_t kBlock = 1 << 20;
  std::vector<uint32_t> block(kBlock / sizeof(uint32_t));
  uint32_t state = 1;
  for (uint32_t& word : block) {
    state = state * 1664525u + 1013904223u;
    // As bf16, f16 or the upper half of an f32 all below 2 and none too small for its type.
    word = (state & 0x83ff83ffu) | 0x3c003c00u;
  }
  char* const data = tensor.view().as<char>();
  const size_t bytes = static_cast<size_t>(tensor.bytes());
  size_t filled = std::min(bytes, kBlock);
  stream.Copy(data, block.data(), filled);
  for (; filled < bytes; filled += std::min(filled, bytes - filled))
    stream.Copy(data + filled, data, std::min(filled, bytes - filled));
  return stream.Synchronize();  // the block goes
}

// Of square matrices; f32 as IEEE fp32.
absl::StatusOr<double> MatMulFlops(Stream& stream, CublasLtPlans& plans, DType dtype, int64_t n,
                                   void* workspace) {
  Tensor x, w, y;
  for (Tensor* tensor : {&x, &w, &y}) {
    ASSIGN_OR_RETURN(*tensor, Tensor::Create(stream.device(), dtype, {n, n}));
    RETURN_IF_ERROR(FillWithNumbers(stream, *tensor));
  }
  const CublasLtShape shape{.in = dtype,
                            .out = dtype,
                            .rows = n,
                            .n = n,
                            .k = n,
                            .x_stride = n,
                            .y_stride = n,
                            .y_alignment = kPlanAlignment};
  const auto multiply = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(
        const bool done,
        plans.MatMul(NativeHandle(stream), shape,
                     {.x = x.view().data, .w = w.view().data, .y = y.view().data}, workspace));
    if (done) return absl::OkStatus();
    return absl::UnimplementedError("cuBLASLt has no algorithm for a ceiling");
  };
  ASSIGN_OR_RETURN(const double seconds, BestSeconds(stream, 10, multiply));
  const double size = static_cast<double>(n);
  return 2.0 * size * size * size / seconds;
}

absl::StatusOr<Ceilings> Measure(Stream& stream) {
  Ceilings ceilings;
  constexpr int64_t kBytes = int64_t{1} << 30;  // no cache holds it
  ASSIGN_OR_RETURN(const Tensor data, Tensor::Create(stream.device(), DType::kU8, {kBytes}));
  ASSIGN_OR_RETURN(const Tensor out, Tensor::Create(stream.device(), DType::kI32, {1}));
  const int blocks = stream.device().spec().multiprocessors * 4;
  ASSIGN_OR_RETURN(const double seconds, BestSeconds(stream, 10, [&] {
                     ReadOnce(NativeHandle(stream), data.view().data, kBytes, blocks,
                              out.view().data);
                     return absl::OkStatus();
                   }));
  ceilings.read_bytes_per_s = static_cast<double>(kBytes) / seconds;
  ASSIGN_OR_RETURN(const std::unique_ptr<CublasLt> cublas, CublasLt::Open());
  CublasLtPlans plans(*cublas);
  ASSIGN_OR_RETURN(const Tensor workspace,
                   Tensor::Create(stream.device(), DType::kU8, {CublasLtPlans::kWorkspaceBytes}));
  void* const scratch = workspace.view().data;
  const auto flops = [&](DType dtype, int64_t n) {
    return MatMulFlops(stream, plans, dtype, n, scratch);
  };
  ASSIGN_OR_RETURN(ceilings.matmul_flops_bf16, flops(DType::kBF16, 8192));
  ASSIGN_OR_RETURN(ceilings.matmul_flops_f16, flops(DType::kF16, 8192));
  ASSIGN_OR_RETURN(ceilings.matmul_flops_f32, flops(DType::kF32, 4096));
  return ceilings;
}

}  // namespace
}  // namespace trireme::cuda

extern "C" {
#pragma GCC visibility push(default)
void trireme_cuda_ceilings(trireme::Stream* stream, absl::StatusOr<trireme::Ceilings>* ceilings) {
  *ceilings = trireme::cuda::Measure(*stream);
}
#pragma GCC visibility pop
}
