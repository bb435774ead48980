// What MoL's scan kernels share: their arguments, which pairs they take, and how counts and keys
// leave them. Internal to kernels/cuda/mol_*.cu.
#pragma once

#include "kernels/cuda/mol_topk.cuh"

namespace trireme::cuda {

inline constexpr int kMolLanes = static_cast<int>(kMolBlockRows);
inline constexpr int kMolQueryStep = 4;  // query vectors are padded with zeros to a multiple of it
inline constexpr int kMolQueryTile = 8;  // dot products of a lane at a time

// MolScanCounts on the device.
struct MolCounters {
  unsigned long long pairs, gated, not_finite;
};
static_assert(sizeof(MolCounters) == 3 * sizeof(int64_t));

// MolPlace of an item's values, 2^shift of them side by side.
__device__ inline int PlaceOf(int k, int lane, int shift) {
  return (((k >> shift) * kMolLanes + lane) << shift) + (k & ((1 << shift) - 1));
}

struct MolScanArguments {
  int query_components, item_components, dim, padded_dim, logits, gate_width, cross_hidden;
  bool diagonal, concat;
  float inverse_temperature;
  // The table.
  const void *components, *gates;
  const __nv_bfloat16 *scales, *gate_scales;
  const uint32_t* order;
  int shift, gate_shift;  // PlaceOf's, of components and gates
  // The queries: [batch, query_components, padded_dim] and [batch, gate_width].
  const float *queries, *query_gates;
  int batch;
  // The gate (CudaMolGate).
  const float *w1, *b1, *w2, *b2;
  int hidden_tiles;
  // What may be answered (MolAllowed) ...
  const uint32_t* masks;
  int64_t mask_words;
  const int32_t *query_mask, *excluded_begin, *excluded;
  // ... or, where it is not null, the candidates: [batch + 1] and their slots.
  const int32_t *candidates_begin, *candidates;
  // Slots, or places in the list of candidates.
  int64_t begin, end;
  MolLists lists;
  MolCounters* counters;  // added to, or null
  float* lane_memory;     // [MolLaneFloats]
};

// Bits of the block's slots that a query may be answered with.
__device__ inline uint32_t MaskWord(const MolScanArguments& a, int query, int64_t block) {
  uint32_t word = a.masks[a.query_mask[query] * a.mask_words + block];
  if (a.excluded_begin == nullptr || word == 0) return word;
  const int64_t slot = block * kMolLanes;
  int low = a.excluded_begin[query];
  const int last = a.excluded_begin[query + 1];
  for (int high = last; low < high;) {
    const int middle = (low + high) / 2;
    if (a.excluded[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (; low < last && a.excluded[low] < slot + kMolLanes; ++low) {
    word &= ~(1u << (a.excluded[low] - slot));
  }
  return word;
}

// Where the items end that a scan's kernel takes: lists of candidates may be shorter than their
// room.
__device__ inline int64_t EndOf(const MolScanArguments& a) {
  return a.candidates == nullptr ? a.end : min(a.end, int64_t{a.candidates_begin[a.batch]});
}

// A warp's part of the counts; each thread counts what is its own.
struct MolTally {
  int pairs = 0, gated = 0, not_finite = 0;
  __device__ void AddTo(MolCounters* counters) const {
    if (counters == nullptr) return;
    const int all_pairs = gpu::WarpSum(pairs), all_gated = gpu::WarpSum(gated);
    const int all_not_finite = gpu::WarpSum(not_finite);
    if (gpu::LaneId() != 0) return;
    if (all_pairs > 0) atomicAdd(&counters->pairs, static_cast<unsigned long long>(all_pairs));
    if (all_gated > 0) atomicAdd(&counters->gated, static_cast<unsigned long long>(all_gated));
    if (all_not_finite > 0) {
      atomicAdd(&counters->not_finite, static_cast<unsigned long long>(all_not_finite));
    }
  }
};

// sums[i] = <query vector i of `count`, the vector of the item in `lane` of the block x>, one chain
// over the dimension. Pieces are of whole steps.
template <int kCount, typename T>
__device__ inline void LaneDots(const T* x, int lane, int shift, int dim, const float* q,
                                int padded_dim, int count, float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
  for (int k = 0; k < dim; k += kMolQueryStep) {
    float v[kMolQueryStep];
    if (shift > 0) {
      LoadFloats(x + PlaceOf(k, lane, shift), v);
    } else {
#pragma unroll
      for (int j = 0; j < kMolQueryStep; ++j) {
        v[j] = k + j < dim ? Float(x[(k + j) * kMolLanes + lane]) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Beyond the last vector the last one once more: no branch.
      float b[kMolQueryStep];
      LoadFloats(q + min(i, count - 1) * padded_dim + k, b);
#pragma unroll
      for (int j = 0; j < kMolQueryStep; ++j) sums[i] = __fmaf_rn(b[j], v[j], sums[i]);
    }
  }
}

// A pair's score goes to its query's list.
__device__ inline void OfferScore(const MolScanArguments& a, float score, int slot, int query,
                                  MolTally& tally) {
  ++tally.gated;
  if (!IsFinite(score)) {
    ++tally.not_finite;
    return;
  }
  Offer(a.lists, query, KeyOf(score, a.order[slot]), slot);
}

// Calls f(float{}), f(__nv_bfloat16{}) or f(int8_t{}).
template <typename F>
void DispatchMolStorage(MolStorage storage, F&& f) {
  switch (storage) {
    case MolStorage::kBF16:
      return f(__nv_bfloat16{});
    case MolStorage::kInt8:
      return f(int8_t{});
    default:
      return f(float{});
  }
}

// Any shape and storage, a lane a pair, fp32 (mol_lanes.cu). `prune`: pairs whose largest logit is
// below the floor of their list skip the gate.
void LaunchMolLaneScan(Stream& stream, MolStorage storage, bool prune, const MolScanArguments& a);
// Logit l of query b and every allowed slot to list b * L + l.
void LaunchMolLaneLogits(Stream& stream, MolStorage storage, const MolScanArguments& a);
// Of the device's memory, for launches over at most `items` slots or candidates: nothing but for
// heads too wide for a multiprocessor's.
int64_t MolLaneFloats(const Stream& stream, int64_t logits, int64_t items);

}  // namespace trireme::cuda
