#include "kernels/cuda/matmul_codes.h"
#include "kernels/cuda/matmul_launch.h"
#include "kernels/quantize.h"

namespace trireme::cuda {
namespace {

// A block's x a row.
constexpr int kThreads = 256, kWarps = kThreads / 32;

// Of the magnitudes' bits, which are ordered as they are, NaN above infinity.
template <int kVector, typename T>
__device__ inline float RowMaximumOf(const T* row, int k) {
  uint32_t largest = 0;
  for (int i = threadIdx.x * kVector; i < k; i += kThreads * kVector) {
    float x[kVector];
    LoadFloats<kVector>(row + i, x);
#pragma unroll
    for (int v = 0; v < kVector; ++v) largest = max(largest, __float_as_uint(x[v]) & 0x7fffffffu);
  }
  GPU_SHARED(part, uint32_t[kWarps]);
  largest = gpu::WarpMax(largest);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = largest;
  __syncthreads();
  return __uint_as_float(gpu::WarpMax(part[threadIdx.x % kWarps]));
}

// Two neighbours of x as codes / `inverse`.
template <bool kPairs, typename T>
__device__ inline uint32_t CodesOf(const T* from, float inverse) {
  float x[2];
  if constexpr (kPairs) {
    LoadFloats<2>(from, x);
  } else {
    x[0] = Float(from[0]), x[1] = Float(from[1]);
  }
  return gpu::PairOfE4M3(x[0] * inverse, x[1] * inverse);
}

// Piece q of a stretch: the lane's 16 bytes, of which word m belongs to k's 16 m to 16 m + 15, with
// 2 q and 2 q + 1 of them in bytes 1 and 3, and 2 q + 8 and 2 q + 9 in bytes 0 and 2.
constexpr bool WordsAreSo() {
  for (int q = 0; q < 4; ++q) {
    for (int m = 0; m < 4; ++m) {
      const int word = q * 16 + m * 4, k = m * 16 + q * 2;
      if (PermutedIndexOf<E4M3>(k) != word + 1 || PermutedIndexOf<E4M3>(k + 1) != word + 3 ||
          PermutedIndexOf<E4M3>(k + 8) != word || PermutedIndexOf<E4M3>(k + 9) != word + 2) {
        return false;
      }
    }
  }
  return true;
}
static_assert(WordsAreSo());

template <bool kPairs, typename T>
__device__ inline uint32_t WordOf(const T* from, float inverse) {
  const uint32_t first = CodesOf<kPairs>(from, inverse), other = CodesOf<kPairs>(from + 8, inverse);
  return (first & 0xff) << 8 | (first & 0xff00) << 16 | (other & 0xff) | (other & 0xff00) << 8;
}

template <int kVector, typename T>
__global__ void __launch_bounds__(kThreads)
    QuantizeRows(const T* x, int64_t x_stride, bool permuted, E4M3* codes, float* scales, int k) {
  gpu::WaitForPrevious();
  const T* const row = x + blockIdx.x * x_stride;
  E4M3* const to = codes + int64_t{blockIdx.x} * k;
  const float scale = ActivationScale(RowMaximumOf<kVector>(row, k)), inverse = 1.0f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale / kKernelScale;
  if (!permuted) {
    for (int i = threadIdx.x; i < k; i += kThreads) {
      const uint32_t code = gpu::PairOfE4M3(Float(row[i]) * inverse, 0.0f);
      to[i] = E4M3{static_cast<uint8_t>(code)};
    }
    return;
  }
  constexpr int kStretch = kStretchOf<E4M3>;
  for (int at = threadIdx.x * 16; at < k; at += kThreads * 16) {
    const T* const from = row + at / kStretch * kStretch + at % kStretch / 8;
    uint32_t words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) words[m] = WordOf<(kVector > 1)>(from + m * 16, inverse);
    *reinterpret_cast<uint4*>(to + at) = uint4{words[0], words[1], words[2], words[3]};
  }
}

}  // namespace

void QuantizeActivations(gpu::StreamHandle handle, ConstTensorView x, bool permuted, E4M3* codes,
                         float* scales) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(x), [&](auto vector) {
      gpu::LaunchDependent({dim3(static_cast<unsigned>(x.dim(0))), dim3(kThreads), 0, handle},
                           QuantizeRows<vector, T>, static_cast<const T*>(x.data), x.stride0,
                           permuted, codes, scales, static_cast<int>(x.dim(1)));
    });
  });
}

absl::StatusOr<int64_t> CodesRoom::Reserve(Device& device, int64_t rows, int64_t k) {
  RETURN_IF_ERROR(room_.Reserve(device, rows * CodesRowBytes(k) + kRoomGap));
  return room_.held();
}

Codes CodesRoom::Quantize(gpu::StreamHandle handle, ConstTensorView x, bool permuted) const {
  const int64_t codes_bytes = (x.dim(0) * x.dim(1) + kRoomGap - 1) / kRoomGap * kRoomGap;
  auto* const codes = static_cast<E4M3*>(room_.data());
  auto* const scales = reinterpret_cast<float*>(static_cast<char*>(room_.data()) + codes_bytes);
  QuantizeActivations(handle, x, permuted, codes, scales);
  return {codes, scales};
}

}  // namespace trireme::cuda
