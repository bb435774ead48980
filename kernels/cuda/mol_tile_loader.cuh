// What the tensor-core scans of MoL (mol_tiles.cu) keep in shared memory, and how items come there.
#pragma once

#include "kernels/cuda/mol_tiles.cuh"

namespace trireme::cuda::mol_tile {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kRows = 16;       // items of a warp's step
constexpr int kItemBytes = 64;  // of a block's 32 items in one dimension
constexpr int64_t kSharedBytes = 160 << 10;
constexpr float kLog2E = 1.4426950408889634f;

enum class Mode { kScan, kPrune, kLogits };

// Queries that share a load of the items: with 64 logits a pair one fills the registers.
template <int kTiles>
inline constexpr int kQueries = kTiles > 4 ? 1 : 2;

// Survivors of a warp waiting for the gate: less than a step, and one more of all queries.
template <int kTiles>
struct Queue {
  static constexpr int kPlaces = kRows + kRows * kQueries<kTiles>;
  // Rows begin in different banks.
  float logits[kPlaces][kTiles * 8 + 4];
  int slots[kPlaces], queries[kPlaces];
};

inline int64_t TileBytes(int64_t vectors, int64_t blocks) { return vectors * kItemBytes * blocks; }
template <int kTiles>
int64_t SharedBytes(const MolTiling& tiling, int64_t vectors) {
  return 2 * TileBytes(vectors, tiling.blocks) + 4 * tiling.hidden * tiling.columns +
         kWarps * static_cast<int64_t>(sizeof(Queue<kTiles>));
}

// Where 16 bytes (8 values of an item) lie in a block's part of a tile: the eight rows of an
// ldmatrix are neighbours, in all banks once.
__device__ inline int PieceOffset(int piece, int item) { return (piece * kMolLanes + item) * 16; }

// The items of the block's steps: blocks of slots, or stretches of candidates. Either way a lane
// brings the pieces of one item, 16 bytes at a time: neighbours of a block lie side by side in the
// table, and of candidates that are far apart half of each sector is used.
class TileLoader {
 public:
  // `end`: of slots or candidates.
  __device__ TileLoader(const MolTileArguments& a, int vectors, int64_t end)
      : a_(a), pieces_(vectors / (a.int8 ? 16 : 8)), vectors_(vectors), end_(end) {}

  // Begins the way of up to `blocks` blocks from slot or candidate `first` on into `to`.
  __device__ void Load(int64_t first, unsigned char* to) const {
    for (int block = 0; block < a_.tiling.blocks && first < end_; ++block, first += kMolLanes) {
      const int lane = gpu::LaneId();
      int64_t slot = first + lane;
      if (a_.scan.candidates != nullptr) slot = a_.scan.candidates[min(slot, end_ - 1)];
      const auto* from = static_cast<const unsigned char*>(a_.scan.components) +
                         (slot / kMolLanes * pieces_ * kMolLanes + slot % kMolLanes) * 16;
      unsigned char* out = to + block * vectors_ * kItemBytes;
      for (int p = static_cast<int>(threadIdx.x) / 32; p < pieces_; p += kWarps) {
        if (a_.int8) {
          Widen(from + p * kMolLanes * 16, out, 2 * p, lane);
        } else {
          gpu::CpAsync16(out + PieceOffset(p, lane), from + p * kMolLanes * 16);
        }
      }
    }
    gpu::CpAsyncCommit();
  }

 private:
  // A piece of int8 as two of bf16, in which whole numbers up to 127 are exact.
  __device__ static void Widen(const unsigned char* from, unsigned char* to, int piece, int lane) {
    const auto pack = *reinterpret_cast<const Pack<int8_t, 16>*>(from);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int8_t* pair = pack.v + half * 8 + 2 * w;
        words[w] = gpu::RoundedPair(Float(pair[0]), Float(pair[1]), __nv_bfloat16());
      }
      *reinterpret_cast<uint4*>(to + PieceOffset(piece + half, lane)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  const MolTileArguments& a_;
  const int pieces_, vectors_;
  const int64_t end_;
};

}  // namespace trireme::cuda::mol_tile
