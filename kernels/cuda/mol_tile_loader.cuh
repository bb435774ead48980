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

// Where 16 bytes (8 items) of a dimension lie in a tile: the rows of an ldmatrix in different
// banks.
__device__ inline int PieceOffset(int vector, int piece) {
  return vector * kItemBytes + (piece ^ (vector / 2 % 4)) * 16;
}

// The items of the block's steps: blocks of slots, or stretches of candidates.
class TileLoader {
 public:
  __device__ TileLoader(const MolTileArguments& a, int vectors) : a_(a), vectors_(vectors) {}

  // Begins the way of up to `blocks` blocks from slot or candidate `first` on into `to`.
  __device__ void Load(int64_t first, unsigned char* to) const {
    for (int block = 0; block < a_.tiling.blocks; ++block, first += kMolLanes) {
      if (first >= a_.scan.end) break;
      unsigned char* out = to + block * vectors_ * kItemBytes;
      if (a_.scan.candidates != nullptr) {
        Gather(first, out);
      } else if (a_.int8) {
        Widen(first / kMolLanes, out);
      } else {
        Copy(first / kMolLanes, out);
      }
    }
    gpu::CpAsyncCommit();
  }

 private:
  __device__ void Copy(int64_t block, unsigned char* to) const {
    const auto* from =
        static_cast<const unsigned char*>(a_.scan.components) + block * vectors_ * kItemBytes;
    for (int i = threadIdx.x; i < vectors_ * 4; i += kThreads) {
      gpu::CpAsync16(to + PieceOffset(i / 4, i % 4), from + int64_t{i} * 16);
    }
  }
  // Whole numbers up to 127 are exact in bf16.
  __device__ void Widen(int64_t block, unsigned char* to) const {
    const auto* from =
        static_cast<const int8_t*>(a_.scan.components) + block * vectors_ * kMolLanes;
    for (int i = threadIdx.x; i < vectors_ * 4; i += kThreads) {
      const Pack<int8_t, 8> pack = *reinterpret_cast<const Pack<int8_t, 8>*>(from + int64_t{i} * 8);
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] =
            gpu::RoundedPair(Float(pack.v[2 * w]), Float(pack.v[2 * w + 1]), __nv_bfloat16());
      }
      *reinterpret_cast<uint4*>(to + PieceOffset(i / 4, i % 4)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __device__ void Gather(int64_t first, unsigned char* to) const {
    const int lane = gpu::LaneId();
    const int64_t slot = a_.scan.candidates[min(first + lane, a_.scan.end - 1)];
    const int64_t at = slot / kMolLanes * vectors_ * kMolLanes + slot % kMolLanes;
    for (int v = static_cast<int>(threadIdx.x) / 32; v < vectors_; v += kWarps) {
      const int64_t element = at + int64_t{v} * kMolLanes;
      __nv_bfloat16 x;
      if (a_.int8) {
        x = Rounded<__nv_bfloat16>(Float(static_cast<const int8_t*>(a_.scan.components)[element]));
      } else {
        x = static_cast<const __nv_bfloat16*>(a_.scan.components)[element];
      }
      *reinterpret_cast<__nv_bfloat16*>(to + PieceOffset(v, lane / 8) + lane % 8 * 2) = x;
    }
  }

  const MolTileArguments& a_;
  const int vectors_;
};

}  // namespace trireme::cuda::mol_tile
