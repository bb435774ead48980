// One row's residual sum and norm by the threads of a block: what the norms' kernels and the
// fused sum over ranks share, so that they have the same bits.
#pragma once

#include <algorithm>

#include "kernels/cuda/primitives.cuh"
#include "kernels/norm.h"

namespace trireme::cuda {

// Threads for a row of `elements`, `vector` of them a load: whole warps, and no more than leave
// each SM four blocks of 2,048 threads' registers.
inline unsigned RowThreads(int64_t elements, int vector) {
  const int64_t loads = (elements + vector - 1) / vector;
  return static_cast<unsigned>(std::clamp<int64_t>((loads + 31) / 32 * 32, 32, 512));
}

// NormParams as kernels take them.
template <typename T>
struct NormWeights {
  const T* weight;
  const T* bias;  // or null
  float eps;
};
template <typename T>
NormWeights<T> WeightsOf(const NormParams& norm) {
  return {static_cast<const T*>(norm.weight.data), static_cast<const T*>(norm.bias.data), norm.eps};
}
// Whether a row's weights go through loads of 16 bytes.
inline bool Vectorizable(const NormParams& norm) {
  return Vectorizable(norm.weight) && (!norm.bias || Vectorizable(norm.bias));
}

// x += delta where kAdd; out = the norm of x. `delta(i, b)` fills b with the V elements from i on.
// A thread reads in later passes what it wrote in the first. Bits hang on V and blockDim.x: those
// of RowThreads. Between two rows of a block there must be a __syncthreads.
template <typename T, int V, NormKind kKind, bool kAdd, typename Delta>
__device__ inline void NormRow(T* x, const Delta& delta, const NormWeights<T>& norm, T* out,
                               int h) {
  constexpr bool kLayer = kKind == NormKind::kLayer;
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
    for (int v = 0; v < V; ++v) sum += kLayer ? a[v] : a[v] * a[v];
  }
  float mean = 0.0f;
  if constexpr (kLayer) {
    mean = BlockSum<1>(sum) / static_cast<float>(h);
    sum = 0.0f;
    for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
      LoadFloats<V>(x + i, a);
#pragma unroll
      for (int v = 0; v < V; ++v) sum = __fmaf_rn(a[v] - mean, a[v] - mean, sum);
    }
  }
  const float scale = rsqrtf(BlockSum(sum) / static_cast<float>(h) + norm.eps);
  float shift[V] = {};
  for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    LoadFloats<V>(x + i, a);
    LoadFloats<V>(norm.weight + i, b);
    if (kLayer && norm.bias != nullptr) LoadFloats<V>(norm.bias + i, shift);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // One way to round in all kernels.
      a[v] =
          kLayer ? __fmaf_rn(__fmul_rn(a[v] - mean, scale), b[v], shift[v]) : a[v] * scale * b[v];
    }
    StoreRounded<V>(out + i, a);
  }
}

// Calls f(std::integral_constant<NormKind, kind>).
template <typename F>
void DispatchNorm(NormKind kind, F&& f) {
  if (kind == NormKind::kLayer) return f(std::integral_constant<NormKind, NormKind::kLayer>());
  f(std::integral_constant<NormKind, NormKind::kRms>());
}

}  // namespace trireme::cuda
