// Attention of few queries over long caches: the keys of a sequence are cut into splits, each a
// block's work, and the block that finishes last folds the splits (Flash-Decoding, Dao et al.
// 2023). All query heads of a kv head, and a sequence's few queries, are rows of one mma, so keys
// and values are read once; more than sixteen rows are as many blocks. The four warps share a
// tile's scores through shared memory, and each sums a quarter of V's columns over all keys, in the
// same order as a prefill warp does.
//
// The grid is fixed and its blocks find their work from the lengths in device memory, so a captured
// launch serves any lengths.
#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/attention_tile.cuh"

namespace trireme::cuda {
namespace {

// With D = 128 the shared memory of a block is 74.5 KiB: three blocks an SM.
constexpr int kThreads = 128, kMaxSequences = 512;

template <typename T, int D>
struct DecodeSmem {
  KvTile<T, D> tiles[2];
  float scores[16][KvTile<T, D>::kKeys + 8];  // rows two 16-byte banks apart
  int first_item[kMaxSequences + 1];          // splits of the sequences before
  int last_of_group;
};

struct Partials {
  int32_t* counters;  // [groups, row_tiles]
  float* data;        // [groups, max_splits, rows * (D + 2)]
  int64_t max_splits, partial_floats;
  int rows, row_tiles;
};

// Splits with keys that the sequence's queries see; [begin, end) of the absolute numbering.
struct SplitRange {
  int begin = 0, end = 0;
};
template <typename T>
__device__ inline SplitRange SplitsOf(const AttentionArguments<T>& a, int s) {
  const int q_len = a.cu_q_lens[s + 1] - a.cu_q_lens[s], kv_len = a.kv_lens[s];
  if (q_len < 1 || q_len > a.decode_q_len) return {};
  return {static_cast<int>(SplitOf(FirstKey(a, kv_len - q_len))),
          static_cast<int>(SplitOf(kv_len - 1)) + 1};
}

// first_item[s] = splits of the sequences before s, for all s. One warp.
template <typename T>
__device__ void CountItems(const AttentionArguments<T>& a, int* first_item) {
  const int lane = gpu::LaneId();
  int before = 0;
  for (int s0 = 0; s0 < a.sequences; s0 += 32) {
    const int s = s0 + lane;
    int splits = 0;
    if (s < a.sequences) {
      const SplitRange range = SplitsOf(a, s);
      splits = range.end - range.begin;
    }
    int sum = splits;
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += other;
    }
    if (s < a.sequences) first_item[s] = before + sum - splits;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) first_item[a.sequences] = before;
}

template <typename T, int D>
class SplitWork {
 public:
  using Tile = KvTile<T, D>;
  static constexpr int kKeys = Tile::kKeys, kTiles = kKeys / 8;
  static constexpr int kPairs = (D / 16 + 3) / 4;  // 16-column pairs of V a warp sums

  // Rows [row0, row0 + 16) of the group.
  __device__ SplitWork(const AttentionArguments<T>& a, DecodeSmem<T, D>& smem, const RowGroup& g,
                       int row0)
      : a_(a), s_(smem), g_(g), row0_(row0), limits_(LimitsOf(a, g, row0)) {
    LoadQueries<T, D>(a, g, row0, q_);
  }

  // Attention over one split's keys.
  __device__ void Run(int split) {
    const int first = FirstKey(a_, g_.position(0));
    const int begin = max(static_cast<int>(SplitBegin(split)), first / kKeys * kKeys);
    const int end = min(static_cast<int>(SplitBegin(split + 1)), g_.kv_len);
    LoadKv<kThreads>(a_, g_, begin, first, end, s_.tiles[0]);
    for (int key0 = begin, stage = 0; key0 < end; key0 += kKeys, stage ^= 1) {
      gpu::CpAsyncWait<0>();
      __syncthreads();  // the tile is here, and all are done with the one before
      if (key0 + kKeys < end) {
        LoadKv<kThreads>(a_, g_, key0 + kKeys, first, end, s_.tiles[stage ^ 1]);
      }
      Add(s_.tiles[stage], key0);
    }
    __syncthreads();
  }

  // Calls f(row, which of the thread's two rows that is, column, sum) for the thread's sums.
  template <typename F>
  __device__ void ForEachSum(F&& f) const {
    const int lane = gpu::LaneId();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int d0 = Column(i);
      if (d0 >= D) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          f(row0_ + lane / 4 + part / 2 * 8, part / 2, d0 + n * 8 + lane % 4 * 2 + part % 2,
            sums_[i][n][part]);
        }
      }
    }
  }
  __device__ const SoftmaxState& state() const { return state_; }

 private:
  __device__ int Column(int i) const { return (i * 4 + static_cast<int>(threadIdx.x) / 32) * 16; }
  __device__ void Add(const Tile& tile, int key0) {
    const int lane = gpu::LaneId(), warp = threadIdx.x / 32;
    if (warp * 16 < kKeys) {
      float scores[2][4];
      ScoreKeys<T, D>(q_, tile, warp * 16, scores[0], scores[1]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          s_.scores[lane / 4 + part / 2 * 8][warp * 16 + n * 8 + lane % 4 * 2 + part % 2] =
              scores[n][part];
        }
      }
    }
    __syncthreads();
    float scores[kTiles][4], fade[2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        scores[n][part] = s_.scores[lane / 4 + part / 2 * 8][n * 8 + lane % 4 * 2 + part % 2];
      }
    }
    SoftmaxStep(scores, key0, limits_, a_.scale, state_, fade);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (Column(i) < D) {
        AddValues<kTiles, T, D>(scores, tile, Column(i), fade, sums_[i][0], sums_[i][1]);
      }
    }
  }

  const AttentionArguments<T>& a_;
  DecodeSmem<T, D>& s_;
  const RowGroup g_;
  const int row0_;
  const RowLimits limits_;
  uint32_t q_[D / 16][4];
  SoftmaxState state_;
  float sums_[kPairs][2][4] = {};
};

template <typename T, int D>
__device__ inline T* OutRow(const AttentionArguments<T>& a, const RowGroup& g, int row) {
  return a.out + (g.first_token + row / g.heads) * a.out_stride +
         (g.kv_head * g.heads + row % g.heads) * D;
}

// Folds the splits of rows [row0, row0 + 16) of the group, first to last, and writes the rows. What
// a few splits hold is loaded at once: one at a time they would be so many waits for memory.
template <typename T, int D>
__device__ void FoldSplits(const AttentionArguments<T>& a, const RowGroup& g, const Partials& p,
                           const float* partials, int splits, int row0) {
  const int rows = min(static_cast<int>(kDecodeTileRows), g.rows() - row0);
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int row = row0 + i / D, column = i % D;
    const float *tops = partials + p.rows * D, *sums = tops + p.rows;
    float top = tops[row], sum = sums[row], value = partials[row * D + column];
    constexpr int kAhead = 8;
    for (int split = 1; split < splits; split += kAhead) {
      float next_tops[kAhead], next_sums[kAhead], next_values[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const float* next = partials + min(split + u, splits - 1) * p.partial_floats;
        next_tops[u] = next[p.rows * D + row];
        next_sums[u] = next[p.rows * (D + 1) + row];
        next_values[u] = next[row * D + column];
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (split + u >= splits) break;
        const SplitFold fold = FoldSplit(top, sum, next_tops[u], next_sums[u], a.scale);
        value = Folded(fold, value, next_values[u]);
        top = fold.top;
        sum = fold.sum;
      }
    }
    OutRow<T, D>(a, g, row)[column] = Rounded<T>(value / sum);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) AttentionDecode(AttentionArguments<T> a, Partials p) {
  using Smem = DecodeSmem<T, D>;
  GPU_DYNAMIC_SHARED(s, Smem);
  gpu::WaitForPrevious();
  if (threadIdx.x < 32) CountItems(a, s->first_item);
  __syncthreads();
  const int64_t items = int64_t{s->first_item[a.sequences]} * a.kv_heads * p.row_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int row_tile = static_cast<int>(item % p.row_tiles);
    const int head = static_cast<int>(item / p.row_tiles % a.kv_heads);
    const int at = static_cast<int>(item / p.row_tiles / a.kv_heads);
    const int sequence = LastNotAbove(s->first_item, a.sequences, at);
    const RowGroup g = GroupOf(a, sequence, head);
    const int row0 = row_tile * static_cast<int>(kDecodeTileRows);
    if (row0 >= g.rows()) continue;  // fewer queries than others: the whole block
    const SplitRange range = SplitsOf(a, sequence);
    const int splits = range.end - range.begin, split = at - s->first_item[sequence];
    SplitWork<T, D> work(a, *s, g, row0);
    work.Run(range.begin + split);
    if (splits == 1) {
      work.ForEachSum([&](int row, int half, int column, float value) {
        if (row < g.rows()) {
          OutRow<T, D>(a, g, row)[column] = Rounded<T>(value / work.state().sum[half]);
        }
      });
      continue;
    }
    const int64_t group = int64_t{sequence} * a.kv_heads + g.kv_head;
    float* partials = p.data + group * p.max_splits * p.partial_floats;
    float* mine = partials + split * p.partial_floats;
    work.ForEachSum([&](int row, int, int column, float value) {
      if (row < g.rows()) mine[row * D + column] = value;
    });
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + static_cast<int>(threadIdx.x) / 4 + half * 8;
        if (row < g.rows()) {
          mine[p.rows * D + row] = work.state().top[half];
          mine[p.rows * (D + 1) + row] = work.state().sum[half];
        }
      }
    }
    __threadfence();
    __syncthreads();
    int32_t& counter = p.counters[group * p.row_tiles + row_tile];
    if (threadIdx.x == 0) s->last_of_group = atomicAdd(&counter, 1) == splits - 1;
    __syncthreads();
    if (s->last_of_group) {
      __threadfence();
      FoldSplits<T, D>(a, g, p, partials, splits, row0);
      if (threadIdx.x == 0) counter = 0;  // for the next launch
    }
    __syncthreads();
  }
}

}  // namespace

template <typename T>
void LaunchAttentionDecode(gpu::StreamHandle handle, const AttentionArguments<T>& arguments,
                           const DecodeWorkspace& workspace, char* memory, char* memory_end,
                           int multiprocessors) {
  auto* const counters = reinterpret_cast<int32_t*>(memory_end - workspace.counter_bytes());
  // Every block counts all sequences of its launch.
  for (int first = 0; first < arguments.sequences; first += kMaxSequences) {
    AttentionArguments<T> a = arguments;
    a.sequences = std::min(kMaxSequences, arguments.sequences - first);
    a.cu_q_lens += first;
    a.kv_lens += first;
    a.page_tables += first * a.table_stride;
    const int64_t groups = int64_t{first} * a.kv_heads;
    Partials p{.counters = counters + groups * workspace.row_tiles(),
               .data = reinterpret_cast<float*>(memory),
               .max_splits = workspace.max_splits,
               .partial_floats = workspace.partial_floats(),
               .rows = static_cast<int>(workspace.rows),
               .row_tiles = static_cast<int>(workspace.row_tiles())};
    p.data += groups * p.max_splits * p.partial_floats;
    const int64_t items = int64_t{a.sequences} * a.kv_heads * p.max_splits * p.row_tiles;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, 3 * multiprocessors));
    DispatchHeadDim(a.head_dim, [&](auto d) {
      constexpr int kD = decltype(d)::value;
      gpu::LaunchDependent({dim3(blocks), dim3(kThreads), sizeof(DecodeSmem<T, kD>), handle},
                           AttentionDecode<T, kD>, a, p);
    });
  }
}
template void LaunchAttentionDecode(gpu::StreamHandle, const AttentionArguments<__nv_bfloat16>&,
                                    const DecodeWorkspace&, char*, char*, int);
template void LaunchAttentionDecode(gpu::StreamHandle, const AttentionArguments<__half>&,
                                    const DecodeWorkspace&, char*, char*, int);

}  // namespace trireme::cuda
