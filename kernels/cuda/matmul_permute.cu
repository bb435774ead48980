// x's columns in the order that the weights are stored in: what a library's matmul reads in x's
// place.
#include "kernels/cuda/matmul_launch.h"
#include "kernels/cuda/matmul_library.h"

namespace trireme::cuda {
namespace {

// Of a stretch's 16 pairs of elements, stored place 4 q + i holds pair q + 4 i.
constexpr bool PairsAreTransposed() {
  for (int k = 0; k < kPermutedBlock; ++k) {
    const int place = PermutedIndex(k) / 2;
    if (k / 2 != place / 4 + place % 4 * 4 || PermutedIndex(k) % 2 != k % 2) return false;
  }
  return true;
}
static_assert(PairsAreTransposed());

// A block's x a row, a thread four places: 16 bytes.
constexpr int kThreads = 128;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    PermuteRows(const uint16_t* x, int64_t x_stride, uint16_t* out, int k) {
  gpu::WaitForPrevious();
  const int at = (blockIdx.y * kThreads + threadIdx.x) * 8;
  if (at >= k) return;
  const int stretch = at / kPermutedBlock * kPermutedBlock, q = at % kPermutedBlock / 8;
  const uint16_t* const from = x + blockIdx.x * x_stride + stretch + 2 * q;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kAligned) {
      pairs[i] = *reinterpret_cast<const uint32_t*>(from + 8 * i);
    } else {
      pairs[i] = uint32_t{from[8 * i]} | uint32_t{from[8 * i + 1]} << 16;
    }
  }
  *reinterpret_cast<uint4*>(out + int64_t{blockIdx.x} * k + at) =
      uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace

void PermuteColumns(gpu::StreamHandle handle, ConstTensorView x, void* out) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 4 == 0 && x.stride0 % 2 == 0;
  const dim3 grid(static_cast<unsigned>(x.dim(0)), Blocks(x.dim(1), 8 * kThreads));
  gpu::LaunchDependent({grid, dim3(kThreads), 0, handle},
                       aligned ? PermuteRows<true> : PermuteRows<false>,
                       static_cast<const uint16_t*>(x.data), x.stride0, static_cast<uint16_t*>(out),
                       static_cast<int>(x.dim(1)));
}

}  // namespace trireme::cuda
