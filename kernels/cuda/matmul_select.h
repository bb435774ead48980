// Which kernel computes a matmul: a pure function, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/dtype.h"

namespace trireme::cuda {

struct MatMulDesc {
  DType dtype = DType::kBF16;  // of x and W
  int64_t rows = 1;
  int64_t n = 4096;
  bool permuted = true;      // W is stored for the tensor cores
  bool vectorizable = true;  // rows of x are whole 16-byte pieces
  // Of a device that was opened with cublas_lt: the stream has room for x in W's order, and for
  // gate and up; its result is rows of whole 16-byte pieces; the bias, if any, is on 16 bytes and
  // of the result's type, as cuBLASLt's epilogue wants it.
  bool cublas_lt = false, result_aligned = true, bias_fits = true;
};

enum class MatMulKernel : uint8_t {
  kStream,      // up to 16 rows: W straight into registers
  kWideTiles,   // up to 64 rows: 64 x 128 tiles, whose k several blocks may share
  kTiles,       // 64 x 64 tiles
  kLargeTiles,  // 128 x 128 tiles
  kPlain,       // multiply-adds, any type and shape
  kLibrary,     // cuBLASLt: only where it was asked for
};

// An mma has 16 rows, so fewer cost the same.
inline constexpr int64_t kFewRowsLimit = 16;
// Of a wide tile. More rows would read W again.
inline constexpr int64_t kWideTileRows = 64, kWideTileColumns = 128;
// Large tiles where they fill an H100's 132 SMs; below, small ones are four times as many blocks.
inline constexpr int64_t kLargeTileBlocks = 132;

// Sums are made in segments of k (matmul_launch.h), of 512 or an eighth of a longer k: a matvec's
// eight warps then have one each, and few sums of segments are to be kept.
constexpr int64_t SegmentOf(int64_t k) {
  constexpr int64_t kLeast = 512, kMost = 8, kUnit = 128;
  return std::max(kLeast, (k + kMost * kUnit - 1) / (kMost * kUnit) * kUnit);
}
constexpr int64_t SegmentsOf(int64_t k) { return (k + SegmentOf(k) - 1) / SegmentOf(k); }

// Up to 64 rows of a model's narrow layers are few tiles: 32 of n = 4096. Each is then several
// blocks' work, which take a range of k's segments each: as many as are on an H100 or H200 at once,
// two on each of 132 SMs.
inline constexpr int64_t kSplitBlocks = 2 * 132;
struct KRanges {
  int64_t ranges = 1;
  int64_t segments = 1;  // of a range; the last may have fewer
};
constexpr int64_t WideTilesOf(int64_t n) { return (n + kWideTileColumns - 1) / kWideTileColumns; }
constexpr KRanges RangesOf(int64_t n, int64_t k) {
  const int64_t all = SegmentsOf(k);
  const int64_t wanted = std::clamp(kSplitBlocks / WideTilesOf(n), int64_t{1}, all);
  const int64_t segments = (all + wanted - 1) / wanted;
  return {(all + segments - 1) / segments, segments};
}
// Sums that the blocks of a tile leave for the one that adds them: the first range's, which are in
// order already, and each segment's of the others.
constexpr int64_t PartsOfTile(int64_t n, int64_t k) {
  return 1 + SegmentsOf(k) - RangesOf(n, k).segments;
}
// Memory of a matmul whose k is shared: a counter for each tile, in kPartsCounterBytes, and the
// parts; 0 where no k is shared. Counters are zero between matmuls.
inline constexpr int64_t kPartsCounterBytes = 1024;
static_assert(kSplitBlocks / 2 * static_cast<int64_t>(sizeof(int32_t)) <= kPartsCounterBytes);
constexpr int64_t PartsBytes(int64_t n, int64_t k) {
  if (RangesOf(n, k).ranges == 1) return 0;
  return kPartsCounterBytes + WideTilesOf(n) * PartsOfTile(n, k) * kWideTileRows *
                                  kWideTileColumns * static_cast<int64_t>(sizeof(float));
}

// The choice between the first four changes no bit of a result, nor does a k that is shared; that
// for kPlain hangs on the model's shapes only, not on the batch. kLibrary has sums of its own,
// which hang on the batch.
constexpr MatMulKernel SelectMatMul(const MatMulDesc& desc) {
  const bool tensor_type = desc.dtype == DType::kBF16 || desc.dtype == DType::kF16;
  if (!tensor_type || !desc.permuted) return MatMulKernel::kPlain;
  const bool many = desc.rows > kFewRowsLimit;
  if (many && desc.cublas_lt && desc.result_aligned && desc.bias_fits)
    return MatMulKernel::kLibrary;
  if (!desc.vectorizable) return MatMulKernel::kPlain;
  if (!many) return MatMulKernel::kStream;
  if (desc.rows <= kWideTileRows) return MatMulKernel::kWideTiles;
  const int64_t large = (desc.rows + 127) / 128 * ((desc.n + 127) / 128);
  return large >= kLargeTileBlocks ? MatMulKernel::kLargeTiles : MatMulKernel::kTiles;
}

}  // namespace trireme::cuda
