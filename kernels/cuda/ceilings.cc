#include "kernels/ceilings.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include "kernels/cuda/cublas_lt.h"
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

absl::StatusOr<double> MatMulFlops(Stream& stream, CublasLt& cublas, DType dtype, int64_t n) {
  Tensor x, w, y;
  for (Tensor* tensor : {&x, &w, &y}) {
    ASSIGN_OR_RETURN(*tensor, Tensor::Create(stream.device(), dtype, {n, n}));
  }
  ASSIGN_OR_RETURN(const double seconds, BestSeconds(stream, 10, [&] {
                     return cublas.MatMul(NativeHandle(stream), dtype, x.view().data, w.view().data,
                                          y.view().data, n, n, n);
                   }));
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
  ASSIGN_OR_RETURN(CublasLt* const cublas, CublasLt::Open());
  ASSIGN_OR_RETURN(ceilings.matmul_flops_bf16, MatMulFlops(stream, *cublas, DType::kBF16, 8192));
  ASSIGN_OR_RETURN(ceilings.matmul_flops_f16, MatMulFlops(stream, *cublas, DType::kF16, 8192));
  ASSIGN_OR_RETURN(ceilings.matmul_flops_f32, MatMulFlops(stream, *cublas, DType::kF32, 4096));
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
