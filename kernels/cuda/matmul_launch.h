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
  int rows, n, k;  // n: rows of W
};

// What becomes of the sums: y itself, or SwiGLU of the first n / 2 columns (gate) and the others
// (up). W is the same either way, rows of the gate, then of up. A block of a gated product takes
// half as many columns of y, and as its columns of W kHalf of the gate's rows, then the same kHalf
// of up's, and so on: a thread that has the sum of column c also has that of column c + kHalf, and
// no sum leaves its thread. Both halves are read in runs of whole rows, as one matrix is, so rows
// interleaved in memory would gain nothing.
enum class Epilogue : uint8_t { kStore, kSwiGlu };

// Columns of y for so many columns of W.
template <Epilogue kEpilogue>
__host__ __device__ constexpr int Outputs(int columns) {
  return kEpilogue == Epilogue::kSwiGlu ? columns / 2 : columns;
}
template <Epilogue kEpilogue, typename T, typename Y>
__host__ __device__ int OutputsOf(const MatMulArguments<T, Y>& a) {
  return Outputs<kEpilogue>(a.n);
}

// Column c of a block's tile of W whose first column of y is y0: its column of y, and its row of W
// where that column is one of y's.
struct TileColumn {
  int output, row;
};
template <Epilogue kEpilogue, int kHalf>
__device__ inline TileColumn TileColumnOf(int n, int y0, int c) {
  if constexpr (kEpilogue == Epilogue::kStore) {
    return {y0 + c, y0 + c};
  } else {
    const int output = y0 + c / (2 * kHalf) * kHalf + c % kHalf;
    return {output, output + (c / kHalf % 2 == 0 ? 0 : n / 2)};
  }
}

template <typename T, typename Y>
__device__ inline float Biased(const MatMulArguments<T, Y>& a, int row_of_w, float sum) {
  return a.bias != nullptr ? __fadd_rn(sum, Float(a.bias[row_of_w])) : sum;
}
template <typename T, typename Y>
__device__ inline void Finish(const MatMulArguments<T, Y>& a, int row, int column, float sum) {
  a.y[row * a.y_stride + column] = Rounded<Y>(Biased(a, column, sum));
}
// Gate and up are rounded, as if they had been stored in between.
template <typename T, typename Y>
__device__ inline void FinishSwiGlu(const MatMulArguments<T, Y>& a, int row, int column, float gate,
                                    float up) {
  gate = Float(Rounded<Y>(Biased(a, column, gate)));
  up = Float(Rounded<Y>(Biased(a, column + a.n / 2, up)));
  a.y[row * a.y_stride + column] = Rounded<Y>(SwiGlu(gate, up));
}

// At most kFewRowsLimit rows: W is read once, straight into registers, and bounds the time.
template <Epilogue kEpilogue, typename T, typename Y>
void LaunchMatMulStream(gpu::StreamHandle handle, const MatMulArguments<T, Y>& a);
// Tiles of 64 x 64 or 128 x 128 through shared memory. x's rows are whole 16-byte pieces.
template <Epilogue kEpilogue, typename T, typename Y>
void LaunchMatMulTiles(gpu::StreamHandle handle, bool large, const MatMulArguments<T, Y>& a);

}  // namespace trireme::cuda
