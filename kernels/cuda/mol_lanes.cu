// MoL's scans for any shape and storage: a lane a pair. Everything a pair needs happens in its
// lane, one chain of fp32 operations in a fixed order, so its bits cannot depend on its neighbours;
// what survives the pruning is collected from several blocks and queries into full warps for the
// gate.
#include "kernels/cuda/mol_scan.cuh"

namespace trireme::cuda {
namespace {

constexpr int kQueue = 2 * kMolLanes;  // places for survivors: less than a warp, and one more
constexpr int64_t kSharedBytes = 160 << 10;
// Where a warp's memory is more than that (417 logits): of all warps together, in the device's.
constexpr int64_t kWideBytes = 256 << 20;

// Memory of a warp: logits of its pairs, those of its survivors, and who they are.
__host__ __device__ constexpr int64_t WarpFloats(int64_t logits) {
  return logits * (kMolLanes + kQueue) + 2 * kQueue;
}

// Shared memory, or, for wide heads, the device's.
template <bool kWide>
__device__ inline float* WarpMemory(const MolScanArguments& a) {
  if constexpr (kWide) {
    const int64_t warp = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
    return a.lane_memory + warp * WarpFloats(a.logits);
  } else {
    GPU_DYNAMIC_SHARED(memory, float);
    return memory + threadIdx.x / 32 * WarpFloats(a.logits);
  }
}

__device__ inline float SiluOf(float x) { return x / __fadd_rn(1.0f, expf(-x)); }

template <typename T>
class LaneScorer {
 public:
  __device__ LaneScorer(const MolScanArguments& a, float* memory)
      : a_(a),
        lane_(gpu::LaneId()),
        logits_(memory),
        queue_(memory + a.logits * kMolLanes),
        queued_slot_(reinterpret_cast<int*>(memory + a.logits * (kMolLanes + kQueue))),
        queued_query_(queued_slot_ + kQueue) {}

  // The logits of this lane's pair; gives the largest.
  __device__ float Logits(int64_t slot, int query) {
    const float* q = a_.queries + int64_t{query} * a_.query_components * a_.padded_dim;
    const int64_t vector = slot / kMolLanes * a_.item_components;
    const int lane = static_cast<int>(slot % kMolLanes);
    const T* x = static_cast<const T*>(a_.components) + vector * a_.dim * kMolLanes;
    float largest = -INFINITY;
    for (int m = 0; m < a_.item_components; ++m, x += a_.dim * kMolLanes) {
      float scale = a_.inverse_temperature;
      if constexpr (sizeof(T) == 1) {
        scale = __fmul_rn(scale, Float(a_.scales[(vector + m) * kMolLanes + slot % 32]));
      }
      if (a_.diagonal) {
        float sum[1];
        LaneDots(x, lane, a_.shift, a_.dim, q + m * a_.padded_dim, a_.padded_dim, 1, sum);
        largest = Keep(m, __fmul_rn(sum[0], scale), largest);
        continue;
      }
      for (int n = 0; n < a_.query_components; n += kMolQueryTile) {
        float sums[kMolQueryTile];
        const int count = min(kMolQueryTile, a_.query_components - n);
        LaneDots(x, lane, a_.shift, a_.dim, q + n * a_.padded_dim, a_.padded_dim, count, sums);
#pragma unroll
        for (int i = 0; i < kMolQueryTile; ++i) {
          if (i >= count) break;
          largest = Keep((n + i) * a_.item_components + m, __fmul_rn(sums[i], scale), largest);
        }
      }
    }
    return largest;
  }
  __device__ float logit(int l) const { return logits_[l * kMolLanes + lane_]; }

  // Gates this lane's pair, whose logits are there, and offers its score. All lanes call it.
  __device__ void Score(bool active, int slot, int query) {
    const float score = Gated(logits_ + lane_, kMolLanes, queue_, slot, query);
    if (active) OfferScore(a_, score, slot, query, tally);
  }

  // Puts the pair aside until a warp is full of them. All lanes call it.
  __device__ void Defer(bool survives, int slot, int query) {
    const uint32_t mask = __ballot_sync(0xffffffffu, survives);
    const int at = queued_ + __popc(mask & ((1u << lane_) - 1));
    if (survives) {
      queued_slot_[at] = slot;
      queued_query_[at] = query;
      for (int l = 0; l < a_.logits; ++l) queue_[l * kQueue + at] = logit(l);
    }
    queued_ += __popc(mask);
    __syncwarp();
    if (queued_ >= kMolLanes) ScoreQueued(kMolLanes);
  }
  __device__ void Finish() {
    if (queued_ > 0) ScoreQueued(queued_);
    tally.AddTo(a_.counters);
  }

  MolTally tally;

 private:
  __device__ float Keep(int l, float logit, float largest) {
    logits_[l * kMolLanes + lane_] = logit;
    return fmaxf(largest, logit);
  }

  // Gates the last `count` (up to 32) of the queue.
  __device__ void ScoreQueued(int count) {
    queued_ -= count;
    const int own = queued_ + (lane_ < count ? lane_ : 0);
    const int slot = queued_slot_[own], query = queued_query_[own];
    const float score = Gated(queue_ + own, kQueue, logits_, slot, query);
    if (lane_ < count) OfferScore(a_, score, slot, query, tally);
    __syncwarp();  // read before the next ones come
  }

  // The gate of the lane's item.
  struct ItemGate {
    const T* block;
    int lane, shift;
    float scale;
    __device__ float operator[](int g) const {
      const float x = Float(block[PlaceOf(g, lane, shift)]);
      return sizeof(T) == 1 ? __fmul_rn(x, scale) : x;
    }
  };
  __device__ ItemGate GateOf(int64_t slot) const {
    ItemGate gate{static_cast<const T*>(a_.gates) + slot / kMolLanes * a_.gate_width * kMolLanes,
                  static_cast<int>(slot % kMolLanes), a_.gate_shift, 1.0f};
    if constexpr (sizeof(T) == 1) gate.scale = Float(a_.gate_scales[slot]);
    return gate;
  }

  // What the output layer works on: hidden units [8 tile, 8 tile + 8).
  __device__ void Hidden(int tile, const float* logits, int stride, const float* query_gate,
                         const ItemGate& item_gate, float (&hidden)[kMolHiddenTile]) const {
    const int first = tile * kMolHiddenTile;
    if (a_.concat) {
#pragma unroll
      for (int i = 0; i < kMolHiddenTile; ++i) {
        hidden[i] = 0.0f;
        if (first + i >= a_.cross_hidden) continue;
        const float x = __fadd_rn(item_gate[first + i], query_gate[first + i]);
        hidden[i] = x < 0.0f ? 0.0f : x;
      }
      return;
    }
    if (a_.cross_hidden == 0) {
#pragma unroll
      for (int i = 0; i < kMolHiddenTile; ++i) {
        hidden[i] = first + i < a_.logits ? logits[(first + i) * stride] : 0.0f;
      }
      return;
    }
    LoadFloats<kMolHiddenTile>(a_.b1 + first, hidden);
    const float* w = a_.w1 + int64_t{tile} * a_.logits * kMolHiddenTile;
    for (int l = 0; l < a_.logits; ++l, w += kMolHiddenTile) AddTo(hidden, w, logits[l * stride]);
#pragma unroll
    for (int i = 0; i < kMolHiddenTile; ++i) hidden[i] = SiluOf(hidden[i]);
  }
  __device__ static void AddTo(float (&sums)[kMolHiddenTile], const float* w, float x) {
    float weights[kMolHiddenTile];
    LoadFloats<kMolHiddenTile>(w, weights);
#pragma unroll
    for (int i = 0; i < kMolHiddenTile; ++i) sums[i] = __fmaf_rn(weights[i], x, sums[i]);
  }

  // The score of the lane's pair: its logits lie `stride` apart, the lane's column of `out` is
  // free.
  __device__ float Gated(const float* logits, int stride, float* out, int64_t slot,
                         int query) const {
    out += lane_;
    const float* query_gate = a_.query_gates + int64_t{query} * a_.gate_width;
    const ItemGate item_gate = GateOf(slot);
    for (int l = 0; l < a_.logits; ++l) out[l * kMolLanes] = a_.b2[l];
    for (int tile = 0; tile < a_.hidden_tiles; ++tile) {
      float hidden[kMolHiddenTile];
      Hidden(tile, logits, stride, query_gate, item_gate, hidden);
      const float* w = a_.w2 + int64_t{tile} * a_.logits * kMolHiddenTile;
      for (int l = 0; l < a_.logits; ++l, w += kMolHiddenTile) {
        float weights[kMolHiddenTile];
        LoadFloats<kMolHiddenTile>(w, weights);
        float sum = out[l * kMolLanes];
#pragma unroll
        for (int i = 0; i < kMolHiddenTile; ++i) sum = __fmaf_rn(weights[i], hidden[i], sum);
        out[l * kMolLanes] = sum;
      }
    }
    float top = -INFINITY;
    for (int l = 0; l < a_.logits; ++l) {
      float w = out[l * kMolLanes];
      if (!a_.concat) {
        w = SiluOf(__fmaf_rn(query_gate[l], item_gate[l], w));
        out[l * kMolLanes] = w;
      }
      top = fmaxf(top, w);
    }
    float total = 0.0f, score = 0.0f;
    for (int l = 0; l < a_.logits; ++l) {
      const float e = expf(__fadd_rn(out[l * kMolLanes], -top));
      total = __fadd_rn(total, e);
      score = __fmaf_rn(e, logits[l * stride], score);
    }
    return score / total;
  }

  const MolScanArguments& a_;
  const int lane_;
  float *logits_, *queue_;  // [L, 32], [L, 64]; each is room for the gate while it is not needed
  int *queued_slot_, *queued_query_;
  int queued_ = 0;
};

// The pair of this lane in the warp's next step.
struct LanePair {
  int slot, query;
  bool active;
};

template <typename T, bool kPrune>
__device__ void ScanPair(const MolScanArguments& a, const LanePair& pair, LaneScorer<T>& scorer) {
  scorer.tally.pairs += pair.active ? 1 : 0;
  const float largest = scorer.Logits(pair.slot, pair.query);
  if constexpr (kPrune) {
    const float floor = PruneFloor(a.lists.thresholds[pair.query], MolPruneMargin(a.logits));
    scorer.Defer(pair.active && !(largest < floor), pair.slot, pair.query);
  } else {
    scorer.Score(pair.active, pair.slot, pair.query);
  }
}

// Blocks against all queries, or candidates; a warp takes every so many-th.
template <typename T, bool kPrune, bool kWide>
__global__ void LaneScan(MolScanArguments a) {
  const int lane = gpu::LaneId(), warps = blockDim.x / 32;
  const int64_t end = EndOf(a);
  LaneScorer<T> scorer(a, WarpMemory<kWide>(a));
  for (int64_t first = a.begin + (int64_t{blockIdx.x} * warps + threadIdx.x / 32) * kMolLanes;
       first < end; first += int64_t{gridDim.x} * warps * kMolLanes) {
    if (a.candidates != nullptr) {
      const int64_t at = min(first + lane, end - 1);
      const LanePair pair{a.candidates[at], LastNotAbove(a.candidates_begin, a.batch, at),
                          first + lane < end};
      ScanPair<T, kPrune>(a, pair, scorer);
      continue;
    }
    for (int query = 0; query < a.batch; ++query) {
      const uint32_t mask = MaskWord(a, query, first / kMolLanes);
      if (mask == 0) continue;
      const LanePair pair{static_cast<int>(first) + lane, query, (mask >> lane & 1) != 0};
      ScanPair<T, kPrune>(a, pair, scorer);
    }
  }
  scorer.Finish();
}

template <typename T, bool kWide>
__global__ void LaneLogits(MolScanArguments a) {
  const int lane = gpu::LaneId(), warps = blockDim.x / 32;
  LaneScorer<T> scorer(a, WarpMemory<kWide>(a));
  for (int64_t first = a.begin + (int64_t{blockIdx.x} * warps + threadIdx.x / 32) * kMolLanes;
       first < a.end; first += int64_t{gridDim.x} * warps * kMolLanes) {
    for (int query = 0; query < a.batch; ++query) {
      const uint32_t mask = MaskWord(a, query, first / kMolLanes);
      if (mask == 0) continue;
      const int slot = static_cast<int>(first) + lane;
      scorer.Logits(slot, query);
      if ((mask >> lane & 1) == 0) continue;
      ++scorer.tally.pairs;
      const uint32_t order = a.order[slot];
      for (int l = 0; l < a.logits; ++l) {
        const float logit = scorer.logit(l);
        if (!IsFinite(logit)) continue;
        Offer(a.lists, int64_t{query} * a.logits + l, KeyOf(logit, order), slot);
      }
    }
  }
  scorer.tally.AddTo(a.counters);
}

using LaneKernel = void (*)(MolScanArguments);

// Who works on `items` slots or candidates.
struct LaneGrid {
  LaneGrid(const Stream& stream, int64_t logits, int64_t items)
      : warp_bytes(WarpFloats(logits) * static_cast<int64_t>(sizeof(float))),
        wide(warp_bytes > kSharedBytes),
        warps(std::clamp<int64_t>((wide ? kWideBytes : kSharedBytes) / warp_bytes, 1, 4)) {
    const int64_t steps = (items + kMolLanes - 1) / kMolLanes;
    blocks =
        std::min<int64_t>((steps + warps - 1) / warps, 4 * stream.device().spec().multiprocessors);
    if (wide) blocks = std::min(blocks, std::max<int64_t>(1, kWideBytes / (warps * warp_bytes)));
  }
  int64_t warp_bytes;
  bool wide;
  int64_t warps, blocks;
};

// The same work in the same order, whichever memory the warps have.
void LaunchLanes(Stream& stream, const MolScanArguments& a, LaneKernel shared, LaneKernel wide) {
  const LaneGrid grid(stream, a.logits, a.end - a.begin);
  gpu::Launch(
      {dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.warps * 32)),
       grid.wide ? 0 : static_cast<size_t>(grid.warps * grid.warp_bytes), NativeHandle(stream)},
      grid.wide ? wide : shared, a);
}

}  // namespace

int64_t MolLaneFloats(const Stream& stream, int64_t logits, int64_t items) {
  const LaneGrid grid(stream, logits, items);
  return grid.wide ? grid.blocks * grid.warps * WarpFloats(logits) : 0;
}

void LaunchMolLaneScan(Stream& stream, MolStorage storage, bool prune, const MolScanArguments& a) {
  DispatchMolStorage(storage, [&](auto zero) {
    using T = decltype(zero);
    prune ? LaunchLanes(stream, a, LaneScan<T, true, false>, LaneScan<T, true, true>)
          : LaunchLanes(stream, a, LaneScan<T, false, false>, LaneScan<T, false, true>);
  });
}

void LaunchMolLaneLogits(Stream& stream, MolStorage storage, const MolScanArguments& a) {
  DispatchMolStorage(storage, [&](auto zero) {
    using T = decltype(zero);
    LaunchLanes(stream, a, LaneLogits<T, false>, LaneLogits<T, true>);
  });
}

}  // namespace trireme::cuda
