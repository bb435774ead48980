// What the matmul kernels share, and their launchers. Internal to kernels/cuda/matmul*.cu and the
// embedding, which reads the same weights.
//
// Weights of two-byte types whose K is a multiple of 32 are stored with each stretch of 32 k's
// permuted, so that 16 neighbouring bytes are what one lane feeds to two mma.m16n8k16 (its B
// fragments, PTX manual, "Matrix fragments for mma.m16n8k16"): a lane loads with full width, from
// global or from shared memory, and no ldmatrix is needed.
//
// Every element is the sum, from first to last, of its segments: kSegment k's each, one chain of
// mma. All tensor-core kernels keep to that, so a row's bits do not depend on the batch it is in.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {

inline constexpr int kPermutedBlock = 32;
inline constexpr int kSegment = 512;

// Where element k of a stretch of 32 is stored.
__host__ __device__ constexpr int PermutedIndex(int k) {
  return (k % 8 / 2) * 8 + k / 16 * 4 + k / 8 % 2 * 2 + k % 2;
}

template <typename T, typename Y>
struct MatMulArguments {
  const T* x;
  const T* w;
  const T* bias;  // or null
  Y* y;
  int64_t x_stride, y_stride;
  int rows, n, k;
};

template <typename T, typename Y>
__device__ inline void Finish(const MatMulArguments<T, Y>& a, int row, int column, float sum) {
  if (a.bias != nullptr) sum = __fadd_rn(sum, Float(a.bias[column]));
  a.y[row * a.y_stride + column] = Rounded<Y>(sum);
}

// At most kFewRowsLimit rows: W is read once, straight into registers, and bounds the time.
template <typename T, typename Y>
void LaunchMatMulStream(gpu::StreamHandle handle, const MatMulArguments<T, Y>& a);
// Tiles of 64 x 64 or 128 x 128 through shared memory. x's rows are whole 16-byte pieces.
template <typename T, typename Y>
void LaunchMatMulTiles(gpu::StreamHandle handle, bool large, const MatMulArguments<T, Y>& a);

}  // namespace trireme::cuda
