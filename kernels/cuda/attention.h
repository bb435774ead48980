// Which kernels compute attention, and what they need: pure functions, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/ops.h"

namespace trireme::cuda {

// Of the kernel for any type, whose rows' sums lie in registers.
inline constexpr int kMaxHeadDim = 256;
// The cache's rows are counted in 32 bits with a sign. A key's page is found by a multiplication
// that is exact while keys times tokens of a page fit into 32 bits.
inline constexpr int64_t kMaxCacheRows = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMaxPageReach = (int64_t{1} << 32) - 1;

struct AttentionDesc {
  DType dtype = DType::kBF16;
  int64_t head_dim = 128;
  int64_t heads_per_group = 1;           // query heads that read one kv head
  int64_t max_kv_len = 0;                // the page tables' capacity
  int64_t min_q_len = 0, max_q_len = 0;  // of the batch's sequences; 0 = unknown
  int64_t decode_q_len = 1;  // queries of a sequence that the workspace has room for; 0 = none
  bool aligned = true;       // pairs of elements of q and out begin on 4 bytes
};

struct AttentionChoice {
  bool plain = false;    // a warp for a row: any type and head_dim; alone
  bool decode = false;   // split keys: sequences of at most decode_q_len queries
  bool prefill = false;  // 128 packed rows a block: all others
  int64_t decode_q_len = 0;
  int64_t max_splits = 0;
};

// A decode block takes one mma's rows of a group; those of a group that has more, of several
// queries or many heads, stand beside each other and find its keys in the second-level cache.
// Beyond a prefill block's rows there is nothing to gain.
inline constexpr int64_t kDecodeTileRows = 16, kDecodeRows = 128;

// Keys are cut into splits at places that hang on nothing but their positions: kFirstSplits of
// kSplitKeys keys, then half as many for each doubling of the length. 256 keys of D = 128 are 128
// KiB, long against a block's start; their merge costs G / 64 of that. So a short sequence fills
// the chip, and one of 131,072 keys has 96 splits to merge and to keep room for.
inline constexpr int64_t kSplitKeys = 256, kFirstSplits = 32;
constexpr int64_t SplitOf(int64_t key) {
  const int64_t unit = key / kSplitKeys;
  int64_t doublings = 0;
  while (unit >> doublings >= kFirstSplits) ++doublings;
  return doublings * (kFirstSplits / 2) + (unit >> doublings);
}
// Its first key.
constexpr int64_t SplitBegin(int64_t split) {
  if (split < kFirstSplits) return split * kSplitKeys;
  constexpr int64_t kHalf = kFirstSplits / 2;
  return (kHalf + split % kHalf) * kSplitKeys << (split / kHalf - 1);
}

constexpr bool HasTiledAttention(DType dtype, int64_t head_dim) {
  const bool tensor_type = dtype == DType::kBF16 || dtype == DType::kF16;
  return tensor_type &&
         (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

// Between decode and prefill the choice changes no bit of a row (attention_tile.cuh).
constexpr AttentionChoice SelectAttention(const AttentionDesc& d) {
  AttentionChoice choice;
  if (!HasTiledAttention(d.dtype, d.head_dim) || !d.aligned) {
    choice.plain = true;
    return choice;
  }
  choice.max_splits = SplitOf(std::max<int64_t>(1, d.max_kv_len) - 1) + 1;
  choice.decode_q_len = std::min(d.decode_q_len, kDecodeRows / d.heads_per_group);
  choice.decode = choice.decode_q_len > 0 && d.min_q_len <= choice.decode_q_len;
  choice.prefill = d.max_q_len == 0 || d.max_q_len > choice.decode_q_len;
  return choice;
}

// A decode launch's workspace: the splits' partial results at its front, a counter for each
// sequence, kv head and tile of rows at its back. A launch of fewer sequences than the workspace
// was made for takes less of both, and its partial results stay clear of the counters of all
// others, which must be zero.
struct DecodeWorkspace {
  int64_t groups = 0;  // sequences * kv heads
  int64_t max_splits = 0;
  int64_t rows = 0;  // decode_q_len * heads_per_group
  int64_t head_dim = 0;
  constexpr int64_t row_tiles() const { return (rows + kDecodeTileRows - 1) / kDecodeTileRows; }
  constexpr int64_t counter_bytes() const { return (groups * row_tiles() * 4 + 255) / 256 * 256; }
  // Of one split: [rows, D] sums, [rows] largest scores, [rows] weight sums; f32.
  constexpr int64_t partial_floats() const { return rows * (head_dim + 2); }
  constexpr int64_t bytes() const {
    return counter_bytes() + groups * max_splits * partial_floats() * 4;
  }
};

constexpr DecodeWorkspace WorkspaceOf(const AttentionDesc& desc, const AttentionChoice& choice,
                                      int64_t sequences, int64_t kv_heads) {
  return {.groups = sequences * kv_heads,
          .max_splits = choice.max_splits,
          .rows = choice.decode_q_len * desc.heads_per_group,
          .head_dim = desc.head_dim};
}

// Of the batches that such limits allow (AttentionLimits of kernels/ops.h).
constexpr int64_t WorkspaceBytes(const AttentionLimits& limits) {
  const AttentionDesc desc{.dtype = limits.dtype,
                           .head_dim = limits.head_dim,
                           .heads_per_group = limits.q_heads / limits.kv_heads,
                           .max_kv_len = limits.max_kv_len,
                           .min_q_len = 0,
                           .max_q_len = 0,
                           .decode_q_len = limits.decode_q_len};
  const AttentionChoice choice = SelectAttention(desc);
  if (!choice.decode) return 0;
  return WorkspaceOf(desc, choice, limits.sequences, limits.kv_heads).bytes();
}

}  // namespace trireme::cuda
