// What the kernels share: conversions, loads of 16 bytes, sums over a block, and the way from a
// DType to the device's element type.
#pragma once

#include <type_traits>

#include "kernels/cuda/gpu.h"
#include "kernels/tensor.h"

namespace trireme::cuda {

// Blocks that do `each` of `work` pieces of work.
inline unsigned Blocks(int64_t work, int64_t each) {
  return static_cast<unsigned>((work + each - 1) / each);
}

__device__ inline float Float(float x) { return x; }
__device__ inline float Float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float Float(__half x) { return __half2float(x); }
__device__ inline float Float(int8_t x) { return static_cast<float>(x); }

// Rounds to nearest even.
template <typename T>
__device__ inline T Rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return x;
  }
}

// silu(gate) * up. No compiler may fuse a step of it, so that all kernels have the same bits.
__device__ inline float SwiGlu(float gate, float up) {
  return __fmul_rn(gate / __fadd_rn(1.0f, expf(-gate)), up);
}

// x times the logistic function (ops.h). As above. Beyond what expf takes the quotient is 0.
__device__ inline float GeluOf(float x) {
  constexpr float kScale = -1.5957691216057308f, kCubic = 0.044715f;  // -2 sqrt(2 / pi)
  const float cube = __fmul_rn(__fmul_rn(x, x), x);
  return x / __fadd_rn(1.0f, expf(__fmul_rn(kScale, __fmaf_rn(kCubic, cube, x))));
}

// V neighbouring elements, moved with one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, typename T>
__device__ inline void LoadFloats(const T* p, float (&out)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = Float(pack.v[i]);
}
template <int V, typename T>
__device__ inline void StoreRounded(T* p, const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = Rounded<T>(x[i]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// The sum over the block's threads, the same bits in all of them. Each kTurn once in a kernel: it
// does not wait for the readers of its result. blockDim.x a multiple of 32.
template <int kTurn = 0>
__device__ inline float BlockSum(float x) {
  GPU_SHARED(part, float[32]);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = gpu::WarpSum(x);
  if (lane == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  return gpu::WarpSum(lane < warps ? part[lane] : 0.0f);
}

// The last i in [0, n) with value[i] <= x, of ascending values with value[0] <= x.
__device__ inline int LastNotAbove(const int32_t* values, int n, int64_t x) {
  int low = 0, high = n - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (values[middle] <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls f(float{}), f(__nv_bfloat16{}) or f(__half{}). REQUIRES: IsFloat(dtype), which ops.cc has
// checked.
template <typename F>
void DispatchFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBF16:
      return f(__nv_bfloat16{});
    case DType::kF16:
      return f(__half{});
    default:
      return f(float{});
  }
}

// Whether every row of the view begins on 16 bytes and is made of whole 16-byte pieces.
template <typename Void>
bool Vectorizable(const BasicTensorView<Void>& view) {
  const int64_t size = static_cast<int64_t>(SizeOf(view.dtype));
  const int64_t width = view.dim(view.shape.rank - 1);
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && width * size % 16 == 0 &&
         (view.shape.rank < 2 || view.stride0 * size % 16 == 0);
}

// Calls f(std::integral_constant<int, V>) with V the elements of T in 16 bytes, or 1.
template <typename T, typename F>
void DispatchVector(bool vectorizable, F&& f) {
  if (vectorizable) return f(std::integral_constant<int, static_cast<int>(16 / sizeof(T))>());
  f(std::integral_constant<int, 1>());
}

}  // namespace trireme::cuda
