// y = x W^T + bias on the tensor cores, 64 columns a block and 16 or 64 rows; what those do not
// take (fp32, odd K, unaligned rows) through plain multiply-adds. Every element is one chain of
// sums in the order of k whatever the tile, so a row's bits do not depend on the batch it is in.
#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_select.h"
#include "kernels/cuda/primitives.cuh"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

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
  if (a.bias != nullptr) sum += Float(a.bias[column]);
  a.y[row * a.y_stride + column] = Rounded<Y>(sum);
}

// --- tensor cores: four warps, k in steps of 32, two stages ---
constexpr int kTileColumns = 64, kStep = 32;
// 80 bytes: the eight rows of an ldmatrix begin in eight different 16-byte bank groups.
constexpr int kPitch = kStep + 8;

// kRowWarps x (4 / kRowWarps) warps, each of kRowTiles x kColumnTiles mma tiles of 16 x 8.
template <int kRowWarps_, int kRowTiles_, int kColumnTiles_>
struct Tiling {
  static constexpr int kRowWarps = kRowWarps_, kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kRows = kRowWarps * kRowTiles * 16;
  static constexpr int kWarpColumns = kColumnTiles * 8;
  static_assert(4 / kRowWarps * kWarpColumns == kTileColumns);
};
using FewRows = Tiling<1, 1, 2>;   // 16 rows: W is read once and bounds the time
using ManyRows = Tiling<2, 2, 4>;  // 64 rows

template <typename T, typename Tile>
struct TileSmem {
  T x[2][Tile::kRows][kPitch], w[2][kTileColumns][kPitch];
};

// Copies [kRows, kStep] from row0, k0 on; zeros beyond the edges. kStep is four 16-byte pieces.
template <int kRows, typename T>
__device__ void LoadTile(T (*to)[kPitch], const T* from, int64_t stride, int row0, int rows, int k0,
                         int k_end) {
  for (int piece = threadIdx.x; piece < kRows * 4; piece += 128) {
    const int r = piece / 4, c = piece % 4 * 8;
    const bool inside = row0 + r < rows && k0 + c < k_end;  // k_end is a multiple of 8
    gpu::CpAsync16(&to[r][c], inside ? from + (row0 + r) * stride + k0 + c : from, inside ? 16 : 0);
  }
}

template <typename T, typename Y, typename Tile>
__global__ void __launch_bounds__(128) MatMulTiles(MatMulArguments<T, Y> a) {
  using Smem = TileSmem<T, Tile>;
  GPU_DYNAMIC_SHARED(s, Smem);
  const int lane = gpu::LaneId(), warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * Tile::kRows, n0 = blockIdx.x * kTileColumns;
  const int wm = warp % Tile::kRowWarps * Tile::kRowTiles * 16;
  const int wn = warp / Tile::kRowWarps * Tile::kWarpColumns;
  const auto load = [&](int stage, int k) {
    LoadTile<Tile::kRows>(s->x[stage], a.x, a.x_stride, m0, a.rows, k, a.k);
    LoadTile<kTileColumns>(s->w[stage], a.w, int64_t{a.k}, n0, a.n, k, a.k);
    gpu::CpAsyncCommit();
  };
  float sums[Tile::kRowTiles][Tile::kColumnTiles][4] = {};
  load(0, 0);
  for (int k = 0, stage = 0; k < a.k; k += kStep, stage ^= 1) {
    if (k + kStep < a.k) {
      load(stage ^ 1, k + kStep);
    } else {
      gpu::CpAsyncCommit();
    }
    gpu::CpAsyncWait<1>();
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < kStep; kk += 16) {
      uint32_t x[Tile::kRowTiles][4], w[Tile::kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        gpu::LdMatrixX4(x[i], &s->x[stage][wm + i * 16 + lane % 16][kk + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles / 2; ++j) {
        gpu::LdMatrixX4(
            w[j], &s->w[stage][wn + j * 16 + lane % 8 + lane / 16 * 8][kk + lane / 8 % 2 * 8]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          const uint32_t pair[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
          gpu::Mma(sums[i][j], x[i], pair, T{});
        }
      }
    }
    __syncthreads();
  }
  gpu::CpAsyncWait<0>();
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int row = m0 + wm + i * 16 + lane / 4 + part / 2 * 8;
        const int column = n0 + wn + j * 8 + lane % 4 * 2 + part % 2;
        if (row < a.rows && column < a.n) Finish(a, row, column, sums[i][j][part]);
      }
    }
  }
}

// --- anything: 64 x 64 tiles, 16 x 16 threads of 4 x 4, k in steps of 16 ---
constexpr int kTile = 64, kPlainStep = 16;

template <typename T, typename Y>
__global__ void __launch_bounds__(256) MatMulPlain(MatMulArguments<T, Y> a) {
  GPU_SHARED(xs, float[kPlainStep][kTile + 1]);
  GPU_SHARED(ws, float[kPlainStep][kTile + 1]);
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sums[4][4] = {};
  for (int k0 = 0; k0 < a.k; k0 += kPlainStep) {
    for (int i = threadIdx.x; i < kTile * kPlainStep; i += 256) {
      const int r = i / kPlainStep, k = i % kPlainStep;
      const bool in_k = k0 + k < a.k;
      xs[k][r] = in_k && m0 + r < a.rows ? Float(a.x[(m0 + r) * a.x_stride + k0 + k]) : 0.0f;
      ws[k][r] = in_k && n0 + r < a.n ? Float(a.w[int64_t{n0 + r} * a.k + k0 + k]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kPlainStep; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += xs[k][ty + 16 * i] * ws[k][tx + 16 * j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = m0 + ty + 16 * i, column = n0 + tx + 16 * j;
      if (row < a.rows && column < a.n) Finish(a, row, column, sums[i][j]);
    }
  }
}

unsigned Blocks(int64_t n, int tile) { return static_cast<unsigned>((n + tile - 1) / tile); }

template <typename Tile, typename T, typename Y>
void LaunchTiles(gpu::StreamHandle handle, const MatMulArguments<T, Y>& a) {
  gpu::Launch({dim3(Blocks(a.n, kTileColumns), Blocks(a.rows, Tile::kRows)), dim3(128),
               sizeof(TileSmem<T, Tile>), handle},
              MatMulTiles<T, Y, Tile>, a);
}

template <typename T, typename Y>
void LaunchMatMul(gpu::StreamHandle handle, MatMulKernel kernel, const MatMulArguments<T, Y>& a) {
  if constexpr (!std::is_same_v<T, float>) {
    if (kernel == MatMulKernel::kFewRows) return LaunchTiles<FewRows>(handle, a);
    if (kernel == MatMulKernel::kManyRows) return LaunchTiles<ManyRows>(handle, a);
  }
  gpu::Launch({dim3(Blocks(a.n, kTile), Blocks(a.rows, kTile)), dim3(256), 0, handle},
              MatMulPlain<T, Y>, a);
}

}  // namespace

void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y) {
  if (x.dim(0) == 0) return;
  const auto& weight = static_cast<const RowMajorLinear&>(w);
  const ConstTensorView matrix(weight.buffer.data(), w.dtype, {w.n, w.k});
  const MatMulKernel kernel =
      SelectMatMul({.dtype = x.dtype,
                    .rows = x.dim(0),
                    .vectorizable = Vectorizable(x) && Vectorizable(matrix)});
  const auto launch = [&](auto zero, auto y_zero) {
    using T = decltype(zero);
    using Y = decltype(y_zero);
    LaunchMatMul<T, Y>(NativeHandle(stream), kernel,
                       {.x = static_cast<const T*>(x.data),
                        .w = static_cast<const T*>(matrix.data),
                        .bias = static_cast<const T*>(bias.data),
                        .y = static_cast<Y*>(y.data),
                        .x_stride = x.stride0,
                        .y_stride = y.stride0,
                        .rows = static_cast<int>(x.dim(0)),
                        .n = static_cast<int>(w.n),
                        .k = static_cast<int>(w.k)});
  };
  DispatchFloat(x.dtype, [&](auto zero) {
    y.dtype == DType::kF32 ? launch(zero, float{}) : launch(zero, zero);
  });
}

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream& stream, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source) {
  auto packed = std::make_unique<RowMajorLinear>();
  packed->n = n;
  packed->k = k;
  packed->dtype = dtype;
  const int64_t row_bytes = k * static_cast<int64_t>(SizeOf(dtype));
  packed->bytes = n * row_bytes;
  ASSIGN_OR_RETURN(packed->buffer, stream.device().Allocate(packed->bytes));
  // 8 MiB: long enough for a copy at full speed, short enough to stay in the host's cache.
  const int64_t rows = std::clamp<int64_t>((8 << 20) / row_bytes, 1, n);
  std::vector<char> staging(rows * row_bytes);
  for (int64_t row = 0; row < n; row += rows) {
    const int64_t count = std::min(rows, n - row);
    RETURN_IF_ERROR(source(row, TensorView(staging.data(), dtype, Shape{count, k})));
    stream.Copy(static_cast<char*>(packed->buffer.data()) + row * row_bytes, staging.data(),
                count * row_bytes);
    RETURN_IF_ERROR(stream.Synchronize());  // before the staging buffer is used again
  }
  return std::unique_ptr<LinearWeight>(std::move(packed));
}

}  // namespace trireme::cuda
