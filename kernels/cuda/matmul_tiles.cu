// y = x W^T on the tensor cores for many rows: tiles of x and W through shared memory with
// cp.async, several stages ahead.
#include "kernels/cuda/matmul_launch.h"

namespace trireme::cuda {
namespace {

constexpr int kStep = 64;  // k's of a stage
// 144 bytes: the rows of an ldmatrix lie in different banks. Codes lie as W does.
template <typename X>
constexpr int kXPitch = std::is_same_v<X, E4M3> ? kStep : kStep + 8;

// kRowWarps x kColumnWarps warps of kRowTiles x kColumnTiles mma tiles of 16 x 8, kBlocks blocks an
// SM at least. kSplits: blocks may share a tile's k.
template <int kRowWarps_, int kColumnWarps_, int kRowTiles_, int kColumnTiles_, int kStages_,
          int kBlocks_ = 1, bool kSplits_ = false>
struct Tiling {
  static constexpr int kRowWarps = kRowWarps_, kRowTiles = kRowTiles_;
  static constexpr int kColumnTiles = kColumnTiles_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr bool kSplits = kSplits_;
  static constexpr int kThreads = kRowWarps * kColumnWarps_ * 32;
  static constexpr int kRows = kRowWarps * kRowTiles * 16;
  static constexpr int kColumns = kColumnWarps_ * kColumnTiles * 8;
};
// 64 x 64: 17 KiB a stage, three blocks an SM. 128 x 128: 34 KiB a stage, one block of eight warps
// with 128 registers of sums each. With W in e4m3 13 and 26 KiB a stage,
// with x too 8 and 16.
//
// 64 x 128, of up to 64 rows: 25 KiB a stage, two blocks of eight warps an SM (of an A100 one). 48
// KiB of W in flight a block, where an SM needs 25 (matmul_stream.cu); against 64 x 64 half the
// blocks read x, against 128 x 128 no mma is of rows that are not there.
using Wide = Tiling<2, 4, 2, 4, 4, 2, true>;
using Small = Tiling<2, 2, 2, 4, 4>;
using Large = Tiling<2, 4, 4, 4, 4>;

template <typename X, typename W, typename Tile>
struct Stage {
  static constexpr int kStretches = kStep / kStretchOf<W>;
  X x[Tile::kRows][kXPitch<X>];
  // A row of a stretch is 64 bytes, two rows are all banks: lanes load 16 bytes without conflict.
  W w[kStretches][Tile::kColumns][kStretchOf<W>];
};

template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X, typename Tile>
class TileProduct {
 public:
  __device__ TileProduct(const MatMulArguments<T, Y, W, X>& a, Stage<X, W, Tile>* stages)
      : a_(a),
        stages_(stages),
        m0_(Tile::kSplits ? 0 : static_cast<int>(blockIdx.x) * Tile::kRows),
        y0_(static_cast<int>(blockIdx.y) * Outputs<kEpilogue>(Tile::kColumns)),
        warp_row_(static_cast<int>(threadIdx.x) / 32 % Tile::kRowWarps * Tile::kRowTiles * 16),
        warp_column_(static_cast<int>(threadIdx.x) / 32 / Tile::kRowWarps * Tile::kColumnTiles *
                     8) {
    x_ = static_cast<uint32_t>(Pieces<X>::Row() * a.x_stride) + Pieces<X>::Column();
    x_rows_ = a.rows - m0_ - Pieces<X>::Row();
    const TileColumn column = TileColumnOf<kEpilogue, 8>(a.n, y0_, Pieces<W>::Row());
    w_ = a.w + int64_t{column.row} * a.k + Pieces<W>::Column();
    columns_ = OutputsOf<kEpilogue>(a) - column.output;
    k_end_ = a.k;
  }

  __device__ void Run(const KSplit& split) {
    int k0 = 0;
    if constexpr (Tile::kSplits) {
      if (split.ranges > 1) {
        k0 = static_cast<int>(blockIdx.z) * split.segments * a_.segment;
        k_end_ = min(a_.k, k0 + split.segments * a_.segment);
      }
    }
    int segment_end = k0 + a_.segment;
#pragma unroll
    for (int s = 0; s < Tile::kStages - 1; ++s) Load(k0 + s * kStep);
    for (; k0 < k_end_; k0 += kStep) {
      gpu::CpAsyncWait<Tile::kStages - 2>();
      __syncthreads();  // this stage is here, and all are done with the one that is loaded next
      Load(k0 + (Tile::kStages - 1) * kStep);
      Multiply(StageOf(k0));
      if (k0 + kStep < min(segment_end, k_end_)) continue;
      segment_end += a_.segment;
      if constexpr (Tile::kSplits) {
        if (blockIdx.z > 0) {
          StorePart(split, 1 + k0 / a_.segment - split.segments, segment_);
          Clear(segment_);
          continue;
        }
      }
      EndSegment();
    }
    gpu::CpAsyncWait<0>();
    if constexpr (Tile::kSplits) {
      if (split.ranges > 1 && !AddParts(split)) return;
    }
    Write();
  }

 private:
  // A thread's pieces of 16 bytes of a tile: always the same columns, of every kEach-th row. That
  // is known before the loop, which would else spend more instructions on addresses than on
  // products.
  template <typename E>
  struct Pieces {
    static constexpr int kElements = 16 / static_cast<int>(sizeof(E));
    static constexpr int kOfRow = kStep / kElements, kEach = Tile::kThreads / kOfRow;
    static_assert(Tile::kThreads % kOfRow == 0 && kEach % 16 == 0);
    __device__ static int Row() { return static_cast<int>(threadIdx.x) / kOfRow; }
    __device__ static int Column() { return static_cast<int>(threadIdx.x) % kOfRow * kElements; }
  };

  __device__ Stage<X, W, Tile>& StageOf(int k0) const {
    return stages_[static_cast<unsigned>(k0) / kStep % Tile::kStages];
  }

  // Zeros beyond the edges; k is whole stretches, so a 16-byte piece is inside or outside.
  __device__ void Load(int k0) {
    Stage<X, W, Tile>& to = StageOf(k0);
    using OfX = Pieces<X>;
    const X* x = a_.x + m0_ * a_.x_stride + (x_ + static_cast<uint32_t>(k0));
    const int x_rows = k0 + OfX::Column() < k_end_ ? x_rows_ : 0;
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += OfX::kEach) {
      const bool inside = r < x_rows;
      gpu::CpAsync16(&to.x[OfX::Row() + r][OfX::Column()], inside ? x : a_.x, inside ? 16 : 0);
      x += OfX::kEach * a_.x_stride;
    }
    using OfW = Pieces<W>;
    const W* w = w_ + k0;
    const int columns = k0 + OfW::Column() < k_end_ ? columns_ : 0;
    W* const w_to = &to.w[OfW::Column() / kStretchOf<W>][OfW::Row()][OfW::Column() % kStretchOf<W>];
#pragma unroll
    for (int r = 0; r < Tile::kColumns; r += OfW::kEach) {
      const bool inside = Outputs<kEpilogue>(r) < columns;
      gpu::CpAsync16(w_to + r * kStretchOf<W>, inside ? w : a_.w, inside ? 16 : 0);
      w += int64_t{Outputs<kEpilogue>(OfW::kEach)} * a_.k;
    }
    gpu::CpAsyncCommit();
  }

  __device__ void Multiply(const Stage<X, W, Tile>& stage) {
    if constexpr (std::is_same_v<X, E4M3>) {
      MultiplyStage(stage);
    } else {
      MultiplyElements(stage);
    }
  }

  __device__ void MultiplyStage(const Stage<X, W, Tile>& stage) {
    static_assert(Stage<X, W, Tile>::kStretches == 1);
    const int lane = gpu::LaneId();
    // A half of a lane's bytes, one mma, at a time: expanded for chips that multiply no codes, more
    // would not fit the registers. Nor would W of all columns at once. Loads of 8 bytes meet in
    // banks, which costs what twice as many bytes do: 16-bit elements.
#pragma unroll 1
    for (int at = lane % 4 * 16; at < lane % 4 * 16 + 16; at += 8) {
      uint2 x[Tile::kRowTiles][2];
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        const int row = warp_row_ + i * 16 + lane / 4;
        x[i][0] = Load8(&stage.x[row][at]), x[i][1] = Load8(&stage.x[row + 8][at]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const uint2 w = Load8(&stage.w[0][warp_column_ + j * 8 + lane / 4][at]);
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) MultiplyCodes(segment_[i][j], x[i], w);
      }
    }
  }

  __device__ void MultiplyElements(const Stage<X, W, Tile>& stage) {
    constexpr int kStretch = kStretchOf<W>, kMmas = kStretch / 16;
    const int lane = gpu::LaneId();
#pragma unroll
    for (int stretch = 0; stretch < Stage<X, W, Tile>::kStretches; ++stretch) {
      uint4 w[Tile::kColumnTiles];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        w[j] = gpu::Load16(
            &stage.w[stretch][warp_column_ + j * 8 + lane / 4][lane % 4 * (kStretch / 4)]);
      }
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
        uint32_t x[Tile::kRowTiles][4];
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
          gpu::LdMatrixX4(x[i], &stage.x[warp_row_ + i * 16 + lane % 16]
                                        [stretch * kStretch + m * 16 + lane / 16 * 8]);
        }
        uint32_t pairs[Tile::kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) WeightFragment<T, W>(w[j], m, pairs[j]);
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < Tile::kColumnTiles; ++j)
            gpu::Mma(segment_[i][j], x[i], pairs[j], T{});
        }
      }
    }
  }

  using Sums = float[Tile::kRowTiles][Tile::kColumnTiles][4];

  __device__ static void Clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) sums[i][j][part] = 0.0f;
      }
    }
  }

  __device__ void EndSegment() {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
          sums_[i][j][part] = __fadd_rn(sums_[i][j][part], segment_[i][j][part]);
      }
    }
    Clear(segment_);
  }

  // Part `index` of the tile, as its threads hold it: 16 bytes of each next to the other's. Rows
  // that are not there are left out.
  template <typename F>
  __device__ void ForEachOfPart(const KSplit& split, int index, F&& f) const {
    const int parts = 1 + (a_.k + a_.segment - 1) / a_.segment - split.segments;
    float* part =
        split.parts +
        (static_cast<int64_t>(blockIdx.y) * parts + index) * Tile::kRows * Tile::kColumns +
        threadIdx.x * 4;
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      if (m0_ + warp_row_ + i * 16 >= a_.rows) break;
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        f(i, j,
          *reinterpret_cast<float4*>(part + (i * Tile::kColumnTiles + j) * Tile::kThreads * 4));
      }
    }
  }
  __device__ void StorePart(const KSplit& split, int index, const Sums& sums) const {
    ForEachOfPart(split, index, [&](int i, int j, float4& to) {
      to = float4{sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]};
    });
  }

  // False: other blocks of this tile are still at it, and the last of them does the rest. True:
  // this is the last, and has the sum of all segments, first to last, whichever came first.
  __device__ bool AddParts(const KSplit& split) {
    if (blockIdx.z == 0) StorePart(split, 0, sums_);
    GPU_SHARED(last, int);
    __threadfence();
    __syncthreads();
    int32_t& arrived = split.arrived[blockIdx.y];
    if (threadIdx.x == 0) last = atomicAdd(&arrived, 1) == split.ranges - 1;
    __syncthreads();
    if (!last) return false;
    __threadfence();
    if (threadIdx.x == 0) arrived = 0;  // for the next launch
    ForEachOfPart(split, 0, [&](int i, int j, const float4& part) {
      sums_[i][j][0] = part.x, sums_[i][j][1] = part.y;
      sums_[i][j][2] = part.z, sums_[i][j][3] = part.w;
    });
    const int segments = (a_.k + a_.segment - 1) / a_.segment;
    for (int index = 1; index <= segments - split.segments; ++index) {
      ForEachOfPart(split, index, [&](int i, int j, const float4& part) {
        segment_[i][j][0] = part.x, segment_[i][j][1] = part.y;
        segment_[i][j][2] = part.z, segment_[i][j][3] = part.w;
      });
      EndSegment();
    }
    return true;
  }

  __device__ void Write() const {
    constexpr int kStride = kEpilogue == Epilogue::kSwiGlu ? 2 : 1;
    const int lane = gpu::LaneId();
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; j += kStride) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = m0_ + warp_row_ + i * 16 + lane / 4 + part / 2 * 8;
          const int column =
              y0_ + Outputs<kEpilogue>(warp_column_ + j * 8) + lane % 4 * 2 + part % 2;
          if (row >= a_.rows || column >= OutputsOf<kEpilogue>(a_)) continue;
          if constexpr (kEpilogue == Epilogue::kSwiGlu) {
            FinishSwiGlu(a_, row, column, sums_[i][j][part], sums_[i][j + 1][part]);
          } else {
            Finish<kEpilogue>(a_, row, column, sums_[i][j][part]);
          }
        }
      }
    }
  }

  const MatMulArguments<T, Y, W, X>& a_;
  Stage<X, W, Tile>* const stages_;
  const int m0_, y0_, warp_row_, warp_column_;  // first row and column of y; the warp's of the tile
  // The thread's first pieces of k = 0, of x its place in the tile's rows, and how many rows and
  // columns of y lie from there on.
  uint32_t x_;
  const W* w_;
  int x_rows_, columns_, k_end_;  // of the block's range
  Sums segment_ = {}, sums_ = {};
};

template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    MatMulTiles(MatMulArguments<T, Y, W, X> a, KSplit split) {
  using Memory = Stage<X, W, Tile>;
  GPU_DYNAMIC_SHARED(stages, Memory);
  gpu::WaitForPrevious();
  TileProduct<kEpilogue, T, Y, W, X, Tile>(a, stages).Run(split);
}

template <Epilogue kEpilogue, typename Tile, typename T, typename Y, typename W, typename X>
void Launch(gpu::StreamHandle handle, const KSplit& split, const MatMulArguments<T, Y, W, X>& a) {
  // Row tiles side by side: the blocks that run together share their tiles of W.
  const dim3 grid(Blocks(a.rows, Tile::kRows),
                  Blocks(OutputsOf<kEpilogue>(a), Outputs<kEpilogue>(Tile::kColumns)),
                  static_cast<unsigned>(split.ranges));
  constexpr size_t kMemory = Tile::kStages * sizeof(Stage<X, W, Tile>);
  gpu::LaunchDependent({grid, dim3(Tile::kThreads), kMemory, handle},
                       MatMulTiles<kEpilogue, T, Y, W, X, Tile>, a, split);
}

}  // namespace

template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
void LaunchMatMulTiles(gpu::StreamHandle handle, MatMulKernel kernel, const KSplit& split,
                       const MatMulArguments<T, Y, W, X>& a) {
  static_assert(Wide::kRows == kWideTileRows && Wide::kColumns == kWideTileColumns);
  if (kernel == MatMulKernel::kWideTiles) return Launch<kEpilogue, Wide>(handle, split, a);
  if (kernel == MatMulKernel::kTiles) return Launch<kEpilogue, Small>(handle, {}, a);
  Launch<kEpilogue, Large>(handle, {}, a);
}

template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulTiles<Epilogue::kStore>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                  const MatMulArguments<__nv_bfloat16, float>&);
template void LaunchMatMulTiles<Epilogue::kStore>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                  const MatMulArguments<__half, __half>&);
template void LaunchMatMulTiles<Epilogue::kStore>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                  const MatMulArguments<__half, float>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                   const MatMulArguments<__half, __half>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, float, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                  const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                  const MatMulArguments<__half, float, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                   const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, float, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__half, __half, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kStore>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__half, float, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kSwiGlu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__half, __half, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                 const MatMulArguments<__half, __half>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(gpu::StreamHandle, MatMulKernel, const KSplit&,
                                                 const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulTiles<Epilogue::kGelu>(
    gpu::StreamHandle, MatMulKernel, const KSplit&,
    const MatMulArguments<__half, __half, E4M3, E4M3>&);

}  // namespace trireme::cuda
