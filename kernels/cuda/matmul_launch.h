// What the matmul kernels share, and their launchers. Internal to kernels/cuda/matmul*.cu and the
// embedding, which reads the same weights.
//
// Weights of two-byte types whose K is a multiple of 32 are stored with each stretch of 32 k's
// permuted, so that 16 neighbouring bytes are what one lane feeds to two mma.m16n8k16 (its B
// fragments, PTX manual, "Matrix fragments for mma.m16n8k16"): a lane loads with full width, from
// global or from shared memory, and no ldmatrix is needed.
//
// Weights of e4m3 whose K is a multiple of 64 likewise, in stretches of 64: 16 neighbouring bytes
// are what one lane feeds to four mma, a word each, whose bytes lie as WeightFragment takes them
// apart.
//
// Activations of e4m3 (matmul_codes.h) lie in the same order, so that a lane's 16 bytes of a row
// are the A fragments of two mma.m16n8k32 whose B fragments its 16 bytes of W are, as they are.
//
// Every element is the sum, from zero on and first to last, of its segments: SegmentOf(k) k's each,
// one chain of mma. All tensor-core kernels keep to that, so a row's bits do not depend on the
// batch it is in.
#pragma once

#include <cstdint>

#include "kernels/cuda/matmul_select.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {

inline constexpr int kPermutedBlock = 32;

// Where element k of a stretch of 32 is stored.
__host__ __device__ constexpr int PermutedIndex(int k) {
  return (k % 8 / 2) * 8 + k / 16 * 4 + k / 8 % 2 * 2 + k % 2;
}

// A stretch is 64 bytes of a row of W.
template <typename W>
inline constexpr int kStretchOf = 64 / static_cast<int>(sizeof(W));
template <typename W>
__host__ __device__ constexpr int PermutedIndexOf(int k) {
  if constexpr (std::is_same_v<W, E4M3>) {
    // Its mma's word: k and k + 1 in bytes 1 and 3, k + 8 and k + 9 in bytes 0 and 2.
    return (k % 8 / 2) * 16 + k / 16 * 4 + (1 - k / 8 % 2) + k % 2 * 2;
  } else {
    return PermutedIndex(k);
  }
}

// The element, or of e4m3 its 256th part (quantize.h).
template <typename W>
__device__ inline float WeightFloat(W w) {
  if constexpr (std::is_same_v<W, E4M3>) {
    return __half2float(
        __ushort_as_half(static_cast<uint16_t>((w.bits & 0x80) << 8 | (w.bits & 0x7f) << 7)));
  } else {
    return Float(w);
  }
}

// Two codes, each in the upper byte of a half, as q / 256: shifted to where T has exponent and
// mantissa. As half-precision numbers they are that, subnormal or not; a bf16 wants 112 more in the
// exponent, which multiplying gives to subnormal numbers too.
__device__ inline uint32_t PairOfCodes(uint32_t codes, __half) {
  return (codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u);
}
__device__ inline uint32_t PairOfCodes(uint32_t codes, __nv_bfloat16 type) {
  constexpr uint32_t kFactors = 0x77807780u;  // 2^112
  return gpu::MulPair((codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u), kFactors, type);
}

// The B fragment of mma m of the stretch of which this lane has 16 bytes. m is a constant.
template <typename T, typename W>
__device__ inline void WeightFragment(const uint4& w, int m, uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<W, E4M3>) {
    const uint32_t codes = m == 0 ? w.x : m == 1 ? w.y : m == 2 ? w.z : w.w;
    b[0] = PairOfCodes(codes, T{});
    b[1] = PairOfCodes(codes << 8, T{});
  } else {
    b[0] = m == 0 ? w.x : w.z;
    b[1] = m == 0 ? w.y : w.w;
  }
}

// Adds half a stretch of e4m3 times e4m3, one mma: a half of this lane's bytes of rows lane / 4 and
// lane / 4 + 8 of x, and of column lane / 4.
__device__ inline void MultiplyCodes(float (&sums)[4], const uint2 (&x)[2], const uint2& w) {
  gpu::MmaE4M3(sums, {x[0].x, x[1].x, x[0].y, x[1].y}, {w.x, w.y});
}
__device__ inline uint2 Load8(const E4M3* p) { return *reinterpret_cast<const uint2*>(p); }

// T is the type of activations, which the bias has; X that of x here: T, or e4m3.
template <typename T, typename Y, typename W = T, typename X = T>
struct MatMulArguments {
  const X* x;
  const W* w;
  const T* bias;  // or null
  Y* y;
  int64_t x_stride, y_stride;
  int rows, n, k;                   // n: rows of W
  int segment;                      // SegmentOf(k)
  const float* scales = nullptr;    // [n] of e4m3: what sums of x q / 256 are times
  const float* x_scales = nullptr;  // [rows] of e4m3: a 256th of the row's
};

// What becomes of the sums: y itself, or y's GELU, or SwiGLU of the first n / 2 columns (gate) and
// the others (up). W is the same either way, rows of the gate, then of up. A block of a gated
// product takes half as many columns of y, and as its columns of W kHalf of the gate's rows, then
// the same kHalf of up's, and so on: a thread that has the sum of column c also has that of column
// c + kHalf, and no sum leaves its thread. Both halves are read in runs of whole rows, as one
// matrix is, so rows interleaved in memory would gain nothing.
enum class Epilogue : uint8_t { kStore, kGelu, kSwiGlu };

// Columns of y for so many columns of W.
template <Epilogue kEpilogue>
__host__ __device__ constexpr int Outputs(int columns) {
  return kEpilogue == Epilogue::kSwiGlu ? columns / 2 : columns;
}
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
__host__ __device__ int OutputsOf(const MatMulArguments<T, Y, W, X>& a) {
  return Outputs<kEpilogue>(a.n);
}

// Column c of a block's tile of W whose first column of y is y0: its column of y, and its row of W
// where that column is one of y's.
struct TileColumn {
  int output, row;
};
template <Epilogue kEpilogue, int kHalf>
__device__ inline TileColumn TileColumnOf(int n, int y0, int c) {
  if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    const int output = y0 + c / (2 * kHalf) * kHalf + c % kHalf;
    return {output, output + (c / kHalf % 2 == 0 ? 0 : n / 2)};
  } else {
    return {y0 + c, y0 + c};
  }
}

template <typename T, typename Y, typename W, typename X>
__device__ inline float Biased(const MatMulArguments<T, Y, W, X>& a, int row, int row_of_w,
                               float sum) {
  if constexpr (std::is_same_v<W, E4M3>) sum = __fmul_rn(sum, a.scales[row_of_w]);
  if constexpr (std::is_same_v<X, E4M3>) sum = __fmul_rn(sum, a.x_scales[row]);
  return a.bias != nullptr ? __fadd_rn(sum, Float(a.bias[row_of_w])) : sum;
}
// What a GELU takes is rounded, and so are gate and up, as if they had been stored in between.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
__device__ inline void Finish(const MatMulArguments<T, Y, W, X>& a, int row, int column,
                              float sum) {
  Y y = Rounded<Y>(Biased(a, row, column, sum));
  if constexpr (kEpilogue == Epilogue::kGelu) y = Rounded<Y>(GeluOf(Float(y)));
  a.y[row * a.y_stride + column] = y;
}
template <typename T, typename Y, typename W, typename X>
__device__ inline void FinishSwiGlu(const MatMulArguments<T, Y, W, X>& a, int row, int column,
                                    float gate, float up) {
  gate = Float(Rounded<Y>(Biased(a, row, column, gate)));
  up = Float(Rounded<Y>(Biased(a, row, column + a.n / 2, up)));
  a.y[row * a.y_stride + column] = Rounded<Y>(SwiGlu(gate, up));
}

// At most kFewRowsLimit rows: W is read once, straight into registers, and bounds the time.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
void LaunchMatMulStream(gpu::StreamHandle handle, const MatMulArguments<T, Y, W, X>& a);
// Where and how blocks share a wide tile's k (matmul_select.h): by default they do not.
struct KSplit {
  int32_t* arrived = nullptr;  // [tiles], zero before and after a launch
  float* parts = nullptr;  // [tiles, parts of a tile, 64 rows, 128 columns] in an order of its own
  int ranges = 1, segments = 0;  // of a range
};
// Tiles through shared memory: kWideTiles, kTiles or kLargeTiles; `split` is for the first. x's
// rows are whole 16-byte pieces.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
void LaunchMatMulTiles(gpu::StreamHandle handle, MatMulKernel kernel, const KSplit& split,
                       const MatMulArguments<T, Y, W, X>& a);

}  // namespace trireme::cuda
