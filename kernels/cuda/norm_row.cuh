// One row's residual sum and RMSNorm by the threads of a block: what the norms' kernels and the
// fused sum over ranks share, so that they have the same bits.
#pragma once

#include <algorithm>

#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {

// Threads for a row of `elements`, `vector` of them a load: whole warps, and no more than leave
// each SM four blocks of 2,048 threads' registers.
inline unsigned RowThreads(int64_t elements, int vector) {
  const int64_t loads = (elements + vector - 1) / vector;
  return static_cast<unsigned>(std::clamp<int64_t>((loads + 31) / 32 * 32, 32, 512));
}

// x += delta where kAdd; out = x / rms * weight. `delta(i, b)` fills b with the V elements from i
// on. A thread reads in the second pass what it wrote in the first. Bits hang on V and blockDim.x:
// those of RowThreads. Between two rows of a block there must be a __syncthreads.
template <typename T, int V, bool kAdd, typename Delta>
__device__ inline void NormRow(T* x, const Delta& delta, const T* weight, float eps, T* out,
                               int h) {
  float sum = 0.0f, a[V], b[V];
  for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    LoadFloats<V>(x + i, a);
    if constexpr (kAdd) {
      delta(i, b);
#pragma unroll
      for (int v = 0; v < V; ++v) a[v] = Float(Rounded<T>(a[v] + b[v]));
      StoreRounded<V>(x + i, a);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sum += a[v] * a[v];
  }
  const float scale = rsqrtf(BlockSum(sum) / static_cast<float>(h) + eps);
  for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    LoadFloats<V>(x + i, a);
    LoadFloats<V>(weight + i, b);
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] = a[v] * scale * b[v];
    StoreRounded<V>(out + i, a);
  }
}

}  // namespace trireme::cuda
