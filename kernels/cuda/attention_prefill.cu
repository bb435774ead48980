// Attention of many queries: a block takes 128 packed rows of a sequence (64 where head_dim is
// 256), sixteen a warp, and walks over the keys that they see in tiles of shared memory
// (FlashAttention-2, Dao 2023). The state of a split is folded into the rows' results at its end,
// as the decode kernel's last block does.
#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/attention_tile.cuh"

namespace trireme::cuda {
namespace {

template <typename T, int D>
struct PrefillShape {
  // D = 128: 70 KiB of tiles, 64 KiB of folded sums; D = 256: 66 + 64 KiB. One block an SM; an
  // A100 has 163 KiB for it.
  static constexpr int kWarps = D > 128 ? 4 : 8, kThreads = kWarps * 32, kRows = kWarps * 16;
};

template <typename T, int D>
struct PrefillSmem {
  KvTile<T, D> tiles[2];
  // What each thread has folded; its own, so no two threads meet.
  float folded[D / 8 * 4][PrefillShape<T, D>::kThreads];
};

// The rows of one warp and their running attention.
template <typename T, int D>
class WarpRows {
 public:
  using Tile = KvTile<T, D>;
  static constexpr int kTiles = Tile::kKeys / 8;

  __device__ WarpRows(const AttentionArguments<T>& a, const RowGroup& g, int row0,
                      PrefillSmem<T, D>& smem)
      : a_(a), s_(smem), limits_(LimitsOf(a, g, row0)) {
    LoadQueries<T, D>(a, g, row0, q_);
  }

  __device__ void Add(const Tile& tile, int key0) {
    float scores[kTiles][4], fade[2];
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      ScoreKeys<T, D>(q_, tile, n * 8, scores[n], scores[n + 1]);
    }
    SoftmaxStep(scores, key0, limits_, a_.scale, state_, fade);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      AddValues<kTiles, T, D>(scores, tile, n * 8, fade, sums_[n], sums_[n + 1]);
    }
  }

  // Ends a split; the next Add begins another.
  __device__ void Fold() {
    if (folds_++ == 0) {
      folded_ = state_;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) s_.folded[i][threadIdx.x] = sums_[i / 4][i % 4];
    } else {
      SplitFold fold[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        fold[half] = FoldSplit(folded_.top[half], folded_.sum[half], state_.top[half],
                               state_.sum[half], a_.scale);
        folded_.top[half] = fold[half].top;
        folded_.sum[half] = fold[half].sum;
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        float& value = s_.folded[i][threadIdx.x];
        value = Folded(fold[i % 4 / 2], value, sums_[i / 4][i % 4]);
      }
    }
    state_ = SoftmaxState();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums_[i / 4][i % 4] = 0.0f;
  }

  // After the last Fold.
  __device__ void Write(const RowGroup& g, int row0) const {
    const int lane = gpu::LaneId();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + half * 8;
      if (row >= g.rows()) continue;
      T* to = a_.out + (g.first_token + row / g.heads) * a_.out_stride +
              (g.kv_head * g.heads + row % g.heads) * D + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float low = s_.folded[n * 4 + half * 2][threadIdx.x];
        const float high = s_.folded[n * 4 + half * 2 + 1][threadIdx.x];
        *reinterpret_cast<uint32_t*>(to + n * 8) =
            gpu::RoundedPair(low / folded_.sum[half], high / folded_.sum[half], T{});
      }
    }
  }

 private:
  const AttentionArguments<T>& a_;
  PrefillSmem<T, D>& s_;
  const RowLimits limits_;
  uint32_t q_[D / 16][4];
  SoftmaxState state_, folded_;
  float sums_[D / 8][4] = {};
  int folds_ = 0;
};

// Row tiles before sequence s, or a few more: what is left over between two sequences is empty.
__device__ inline int64_t FirstRowTile(const int32_t* cu_q_lens, int s, int heads, int rows) {
  return int64_t{cu_q_lens[s]} * heads / rows + s;
}

template <typename T, int D>
__global__ void __launch_bounds__(PrefillShape<T, D>::kThreads)
    AttentionPrefill(AttentionArguments<T> a) {
  using Smem = PrefillSmem<T, D>;
  using Shape = PrefillShape<T, D>;
  constexpr int kKeys = KvTile<T, D>::kKeys;
  GPU_DYNAMIC_SHARED(s, Smem);
  gpu::WaitForPrevious();
  const int heads = a.q_heads / a.kv_heads;
  int sequence = 0;
  for (int high = a.sequences - 1; sequence < high;) {
    const int middle = (sequence + high + 1) / 2;
    if (FirstRowTile(a.cu_q_lens, middle, heads, Shape::kRows) <=
        static_cast<int64_t>(blockIdx.x)) {
      sequence = middle;
    } else {
      high = middle - 1;
    }
  }
  const RowGroup g = GroupOf(a, sequence, static_cast<int>(blockIdx.y));
  const int tiles = (g.rows() + Shape::kRows - 1) / Shape::kRows;
  // The last rows see the most keys: they start first.
  const int tile =
      tiles - 1 -
      static_cast<int>(blockIdx.x - FirstRowTile(a.cu_q_lens, sequence, heads, Shape::kRows));
  if (tile < 0 || g.q_len <= a.decode_q_len) return;
  const int row0 = tile * Shape::kRows;
  const int first = FirstKey(a, g.position(row0));
  const int end = g.position(min(row0 + Shape::kRows, g.rows()) - 1) + 1;
  const int begin = first / kKeys * kKeys;
  const int warp_row0 = row0 + static_cast<int>(threadIdx.x) / 32 * 16;
  WarpRows<T, D> rows(a, g, warp_row0, *s);
  LoadKv<Shape::kThreads>(a, g, begin, first, end, s->tiles[0]);
  int split = static_cast<int>(SplitOf(begin));
  for (int key0 = begin, stage = 0; key0 < end; key0 += kKeys, stage ^= 1) {
    gpu::CpAsyncWait<0>();
    __syncthreads();  // the tile is here, and all are done with the one before
    const int next = key0 + kKeys;
    if (next < end) LoadKv<Shape::kThreads>(a, g, next, first, end, s->tiles[stage ^ 1]);
    rows.Add(s->tiles[stage], key0);
    if (next < SplitBegin(split + 1) && next < end) continue;
    rows.Fold();
    ++split;
  }
  rows.Write(g, warp_row0);
}

}  // namespace

template <typename T>
void LaunchAttentionPrefill(gpu::StreamHandle handle, const AttentionArguments<T>& arguments,
                            int64_t q_rows) {
  const int heads = arguments.q_heads / arguments.kv_heads;
  DispatchHeadDim(arguments.head_dim, [&](auto d) {
    constexpr int kD = decltype(d)::value;
    using Shape = PrefillShape<T, kD>;
    const int64_t tiles = q_rows * heads / Shape::kRows + arguments.sequences;
    gpu::LaunchDependent(
        {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(arguments.kv_heads)),
         dim3(Shape::kThreads), sizeof(PrefillSmem<T, kD>), handle},
        AttentionPrefill<T, kD>, arguments);
  });
}
template void LaunchAttentionPrefill(gpu::StreamHandle, const AttentionArguments<__nv_bfloat16>&,
                                     int64_t);
template void LaunchAttentionPrefill(gpu::StreamHandle, const AttentionArguments<__half>&, int64_t);

}  // namespace trireme::cuda
