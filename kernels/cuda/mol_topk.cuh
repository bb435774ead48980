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

// Device memory for the work of one op.
template <typename T>
class Scratch {
 public:
  Scratch(Stream& stream, int64_t count)
      : handle_(NativeHandle(stream)),
        data_(static_cast<T*>(gpu::AllocateInOrder(handle_, count * sizeof(T)))) {}
  ~Scratch() { gpu::FreeInOrder(handle_, data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  gpu::StreamHandle handle_;
  T* data_;
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
__device__ inline float PruneFloor(uint64_t threshold) {
  if (threshold == 0) return -INFINITY;
  const float score = ScoreOf(threshold);
  return __fadd_rn(__fmaf_rn(-1e-5f, fabsf(score), score), -1e-6f);
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

// The lists of one op.
class MolTopKScan {
 public:
  // `items`: what will be offered to a list, at most.
  MolTopKScan(Stream& stream, int64_t lists, int64_t k, int64_t items);
  const MolLists& lists() const { return view_; }

  // Calls scan(begin, end) for the pieces of [0, items); all but the last are whole blocks.
  template <typename Scan>
  void Run(Scan&& scan) {
    int64_t piece = std::max(4 * k_, kFirstPiece);
    for (int64_t begin = 0; begin < items_;) {
      const int64_t whole = std::min(piece, longest_) / kMolBlockRows * kMolBlockRows;
      const int64_t end = std::min(items_, begin + whole);
      scan(begin, end);
      Cut(end == items_);
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
  const int64_t lists_, k_, items_, longest_, capacity_;
  MolLists view_;
  Scratch<uint64_t> keys_, thresholds_;
  Scratch<int32_t> slots_, counts_, holes_;
};

}  // namespace trireme::cuda
