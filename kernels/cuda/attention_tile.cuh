// What the attention kernels for tensor cores share: sixteen query rows a warp against tiles of
// keys in shared memory, with the softmax streaming over the tiles (FlashAttention-2, Dao 2023,
// section 3).
//
// Rows are packed: the query heads that read one kv head stand side by side, so row r of a sequence
// is head r % G of token r / G (G heads a group) and a key is read once for all of them.
//
// The order of every sum hangs on the absolute positions of the keys alone: tiles of kKeys keys are
// folded into the state of their split (SplitOf: a multiple of kKeys), splits into the
// row's result, both from the first to the last. A key that a row does not see adds exactly
// nothing. So a row has the same bits in every kernel, batch and chunk.
#pragma once

#include <climits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {

template <typename T>
struct AttentionArguments {
  const T *q, *k, *v;
  const int32_t *page_tables, *cu_q_lens, *kv_lens;
  T* out;
  int64_t q_stride, out_stride, table_stride;
  float scale;  // of the scores; times log2(e) in the tiled kernels
  int sliding_window, sequences, q_heads, kv_heads, head_dim, page_size;
  int decode_q_len;  // sequences of at most so many queries are the decode kernel's
  // ceil(2^32 / page_size): a key times this, shifted down, is key / page_size where key *
  // page_size is below 2^32, for a fraction of what a division by an unknown number costs.
  uint64_t page_reciprocal;
};

// Key tiles in shared memory. The pitch spreads the eight rows of an ldmatrix over all banks.
template <typename T, int D>
struct KvTile {
  static constexpr int kKeys = D > 128 ? 32 : 64;
  static constexpr int kPitch = D + 8;
  T k[kKeys][kPitch], v[kKeys][kPitch];
};

// One sequence's rows under one kv head.
struct RowGroup {
  int first_token = 0;  // row of q of the sequence's first query
  int q_len = 0, kv_len = 0, kv_head = 0;
  int heads = 1;  // G
  const int32_t* pages = nullptr;
  __device__ int rows() const { return q_len * heads; }
  __device__ int position(int row) const { return kv_len - q_len + row / heads; }
};

template <typename T>
__device__ inline RowGroup GroupOf(const AttentionArguments<T>& a, int s, int kv_head) {
  const int begin = a.cu_q_lens[s];
  return {begin,   a.cu_q_lens[s + 1] - begin, a.kv_lens[s],
          kv_head, a.q_heads / a.kv_heads,     a.page_tables + s * a.table_stride};
}
template <typename T>
__device__ inline int FirstKey(const AttentionArguments<T>& a, int position) {
  return a.sliding_window > 0 ? max(0, position - a.sliding_window + 1) : 0;
}
// Element offset in the cache of the row that holds key `key` of a kv head. Rows are counted in 32
// bits.
template <typename T>
__device__ inline int64_t CacheRow(const AttentionArguments<T>& a, const int32_t* pages, int key,
                                   int kv_head) {
  const int page = static_cast<int>(static_cast<uint32_t>(key) * a.page_reciprocal >> 32);
  const int slot = pages[page] * a.page_size + (key - page * a.page_size);
  return int64_t{slot * a.kv_heads + kv_head} * a.head_dim;
}

// Starts the copy of keys [key0, key0 + kKeys) and their values; those outside [first, end) become
// zeros.
template <int kThreads, typename T, int D>
__device__ inline void LoadKv(const AttentionArguments<T>& a, const RowGroup& g, int key0,
                              int first, int end, KvTile<T, D>& tile) {
  constexpr int kPieces = D / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < KvTile<T, D>::kKeys * kPieces; i += kThreads) {
    const int r = i / kPieces, c = i % kPieces * 8, key = key0 + r;
    const bool inside = key >= first && key < end;
    // Outside, the address of a key that is there, of which nothing is read: no branch.
    const int64_t at = CacheRow(a, g.pages, min(max(key, first), end - 1), g.kv_head) + c;
    gpu::CpAsync16(&tile.k[r][c], a.k + at, inside ? 16 : 0);
    gpu::CpAsync16(&tile.v[r][c], a.v + at, inside ? 16 : 0);
  }
  gpu::CpAsyncCommit();
}

// The mma fragments of rows [row0, row0 + 16); zeros beyond the last row.
template <typename T, int D>
__device__ inline void LoadQueries(const AttentionArguments<T>& a, const RowGroup& g, int row0,
                                   uint32_t (&q)[D / 16][4]) {
  const int lane = gpu::LaneId();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + half * 8;
    const bool inside = row < g.rows();
    const T* from = a.q;
    if (inside) {
      from += (g.first_token + row / g.heads) * a.q_stride +
              (g.kv_head * g.heads + row % g.heads) * D + lane % 4 * 2;
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        q[d][part * 2 + half] =
            inside ? *reinterpret_cast<const uint32_t*>(from + d * 16 + part * 8) : 0u;
      }
    }
  }
}

// Scores of the warp's rows for keys [key, key + 16) of the tile: two mma tiles of eight.
template <typename T, int D>
__device__ inline void ScoreKeys(const uint32_t (&q)[D / 16][4], const KvTile<T, D>& tile, int key,
                                 float (&low)[4], float (&high)[4]) {
  const int lane = gpu::LaneId();
#pragma unroll
  for (int part = 0; part < 4; ++part) low[part] = high[part] = 0.0f;
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t k[4];
    gpu::LdMatrixX4(k, &tile.k[key + lane % 8 + lane / 16 * 8][d * 16 + lane / 8 % 2 * 8]);
    const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
    gpu::Mma(low, q[d], first, T{});
    gpu::Mma(high, q[d], second, T{});
  }
}

// Largest score and weight sum of the thread's two rows, lane / 4 and lane / 4 + 8. Scores are kept
// as they come from the mma; `scale` (with log2(e)) goes into the exponent.
struct SoftmaxState {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};
// Where exponents are counted from; finite also when nothing was seen yet.
__device__ inline float Base(float top, float scale) {
  return top == -INFINITY ? 0.0f : __fmul_rn(top, scale);
}
__device__ inline float Weight(float score, float scale, float base) {
  return gpu::Exp2(__fmaf_rn(score, scale, -base));
}
// What was summed under `top` fades by this under `new_top`: by exactly nothing where they are the
// same, although a weight of the largest score itself is 1 but for a rounding. Else a row's bits
// would tell which keys that it does not see its block has walked over.
__device__ inline float Fade(float top, float new_top, float scale, float base) {
  return top == new_top ? 1.0f : Weight(top, scale, base);
}
// The thread's rows: keys [first, last] are seen. Rows behind the last are zeros that nobody takes,
// and see all.
struct RowLimits {
  int first[2], last[2];
  __device__ bool see(int from, int to) const {
    return from >= max(first[0], first[1]) && to <= min(last[0], last[1]);
  }
};
template <typename T>
__device__ inline RowLimits LimitsOf(const AttentionArguments<T>& a, const RowGroup& g, int row0) {
  RowLimits limits;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + gpu::LaneId() / 4 + half * 8;
    const bool inside = row < g.rows();
    limits.last[half] = inside ? g.position(row) : INT_MAX;
    limits.first[half] = inside ? FirstKey(a, limits.last[half]) : 0;
  }
  return limits;
}

// Turns the scores of kTiles * 8 keys from key0 on into weights, and gives the factor by which what
// was summed before fades.
template <int kTiles>
__device__ inline void SoftmaxStep(float (&scores)[kTiles][4], int key0, const RowLimits& limits,
                                   float scale, SoftmaxState& state, float (&fade)[2]) {
  const int column = gpu::LaneId() % 4 * 2;
  if (!limits.see(key0, key0 + kTiles * 8 - 1)) {  // few tiles
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      const int key = key0 + i / 4 * 8 + column + i % 2, half = i % 4 / 2;
      if (key < limits.first[half] || key > limits.last[half]) scores[i / 4][i % 4] = -INFINITY;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      top = fmaxf(top, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(top, state.top[half]);
    const float base = Base(top, scale);
    fade[half] = Fade(state.top[half], top, scale, base);
    state.top[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[n][half * 2 + e];
        score = Weight(score, scale, base);
        sum = __fadd_rn(sum, score);
      }
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
    state.sum[half] = __fmaf_rn(state.sum[half], fade[half], sum);
  }
}

// sums (two mma tiles: 16 columns of V from d0 on) = sums * fade + weights * V.
template <int kTiles, typename T, int D>
__device__ inline void AddValues(const float (&weights)[kTiles][4], const KvTile<T, D>& tile,
                                 int d0, const float (&fade)[2], float (&low)[4],
                                 float (&high)[4]) {
  const int lane = gpu::LaneId();
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    low[part] = __fmul_rn(low[part], fade[part / 2]);
    high[part] = __fmul_rn(high[part], fade[part / 2]);
  }
#pragma unroll
  for (int kk = 0; kk < kTiles / 2; ++kk) {
    const uint32_t p[4] = {gpu::RoundedPair(weights[2 * kk][0], weights[2 * kk][1], T{}),
                           gpu::RoundedPair(weights[2 * kk][2], weights[2 * kk][3], T{}),
                           gpu::RoundedPair(weights[2 * kk + 1][0], weights[2 * kk + 1][1], T{}),
                           gpu::RoundedPair(weights[2 * kk + 1][2], weights[2 * kk + 1][3], T{})};
    uint32_t v[4];
    gpu::LdMatrixX4Trans(v, &tile.v[kk * 16 + lane % 16][d0 + lane / 16 * 8]);
    const uint32_t first[2] = {v[0], v[1]}, second[2] = {v[2], v[3]};
    gpu::Mma(low, p, first, T{});
    gpu::Mma(high, p, second, T{});
  }
}

// Folding a split into the row's result so far: both fade to the larger maximum.
struct SplitFold {
  float top, sum, fade, split_fade;
};
__device__ inline SplitFold FoldSplit(float top, float sum, float split_top, float split_sum,
                                      float scale) {
  SplitFold fold;
  fold.top = fmaxf(top, split_top);
  const float base = Base(fold.top, scale);
  fold.fade = Fade(top, fold.top, scale, base);
  fold.split_fade = Fade(split_top, fold.top, scale, base);
  fold.sum = __fadd_rn(__fmul_rn(sum, fold.fade), __fmul_rn(split_sum, fold.split_fade));
  return fold;
}
__device__ inline float Folded(const SplitFold& fold, float value, float split_value) {
  return __fadd_rn(__fmul_rn(value, fold.fade), __fmul_rn(split_value, fold.split_fade));
}

}  // namespace trireme::cuda
