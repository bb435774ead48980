// Streaming top-k of MoL's scans. A scan goes over the items in pieces, each at most as long as all
// before it. Within a piece a list takes every key above its threshold; between pieces lists that
// are full enough are cut back to their k largest, and the k-th becomes the threshold. So a list
// needs room for 2 k keys and a piece, whatever the scores, no score below the threshold is ever
// written, and, keys being unique, the k best do not depend on the order they came in.
#pragma once

#include <algorithm>

#include "kernels/cuda/mol_ops.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {

// An op's workspace, handed out piece by piece. Over no memory at all it only counts, so that what
// an op takes and what it says that it takes are one piece of code.
class Workspace {
 public:
  explicit Workspace(void* data) : data_(static_cast<char*>(data)) {}
  template <typename T>
  T* Take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* const taken = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + bytes_);
    const auto bytes = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* const data_;
  int64_t bytes_ = 0;
};

// Lists as the scan kernels see them.
struct MolLists {
  uint64_t* keys;        // [lists, capacity], in any order
  int32_t* slots;        // [lists, capacity]
  int* counts;           // [lists]
  uint64_t* thresholds;  // [lists]: keys at or below it are not among the k best
  int64_t capacity;
};

// MolKey and MolKeyScore of mol_ops.h.
__device__ inline uint64_t KeyOf(float score, uint32_t order) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~order);
}
__device__ inline float ScoreOf(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}
// MolPruneFloor of a list's threshold; -infinity where it has none.
__device__ inline float PruneFloor(uint64_t threshold, float margin) {
  if (threshold == 0) return -INFINITY;
  const float score = ScoreOf(threshold);
  return __fadd_rn(__fmaf_rn(-margin, fabsf(score), score), -1e-6f);
}
__device__ inline bool IsFinite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}
__device__ inline void Offer(const MolLists& to, int64_t list, uint64_t key, int slot) {
  if (key <= to.thresholds[list]) return;
  const int at = atomicAdd(&to.counts[list], 1);
  to.keys[list * to.capacity + at] = key;
  to.slots[list * to.capacity + at] = slot;
}

// Room for the lists of one op. `items`: what will be offered to a list, at most.
struct MolTopKMemory {
  MolTopKMemory(Workspace& workspace, int64_t lists, int64_t k, int64_t items);
  int64_t lists, k, items;
  int64_t longest;  // piece
  MolLists view;
  int32_t* holes;        // [lists, k]
  uint64_t* spare_keys;  // [lists, k], for merging lists that are sorted in several chunks
  int32_t* spare_slots;
};

// The lists of one op.
class MolTopKScan {
 public:
  MolTopKScan(Stream& stream, const MolTopKMemory& memory);

  // Calls scan(begin, end) for the pieces of [0, items); all but the last are whole blocks.
  template <typename Scan>
  void Run(Scan&& scan) {
    int64_t piece = std::max(4 * memory_.k, kFirstPiece);
    for (int64_t begin = 0; begin < memory_.items;) {
      const int64_t whole = std::min(piece, memory_.longest) / kMolBlockRows * kMolBlockRows;
      const int64_t end = std::min(memory_.items, begin + whole);
      scan(begin, end);
      Cut(end == memory_.items);
      piece = std::max(piece, end);
      begin = end;
    }
  }
  // Sorts the k best of every list; after Run.
  void Write(const MolTopK& out);

 private:
  static constexpr int64_t kFirstPiece = 1024;
  void Cut(bool last);

  Stream& stream_;
  const MolTopKMemory memory_;
};

}  // namespace trireme::cuda
