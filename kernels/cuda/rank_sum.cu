#include <algorithm>

#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/rank_sum.h"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    SumRanks(const T* parts, int64_t stride, int ranks, int64_t count, T* out) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    float sum = Float(parts[i]);
    for (int rank = 1; rank < ranks; ++rank) sum = __fadd_rn(sum, Float(parts[rank * stride + i]));
    out[i] = Rounded<T>(sum);
  }
}

}  // namespace

void RankSum(gpu::StreamHandle stream, DType dtype, const void* parts, int64_t stride, int ranks,
             int64_t count, void* out) {
  const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 1024);
  DispatchFloat(dtype, [&](auto zero) {
    using T = decltype(zero);
    gpu::Launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, SumRanks<T>,
                static_cast<const T*>(parts), stride, ranks, count, static_cast<T*>(out));
  });
}

}  // namespace trireme::cuda
