// The end of sampling: each row's token, out of what the shards of its vocabulary answered
// (sampling.h), where these few candidates are enough to tell. Rules as in ops.h; R rows, S shards,
// K candidates of a row in each, L of its raw logits, P penalties.
#pragma once

#include <cstdint>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/philox.h"
#include "kernels/tensor.h"

namespace trireme {

// One shard's answers. Contiguous; K and L at most kOrderedCandidates, so lists are best first.
struct ShardAnswers {
  ConstTensorView largest, sum;               // SummarizeLogits' [R] f32 and f64,
  ConstTensorView scores, columns;            // [R, K] f32 and i32, behind the penalties
  ConstTensorView keys, drawn_scores, drawn;  // DrawTokens' [R] f64, f32, i32
  ConstTensorView raw_largest, raw_sum;       // SummarizeLogits' before the penalties, at
  ConstTensorView raw_scores, raw_columns;    // temperature 1: [R], and [R, L]
  TensorView raw, drawn_raw;                  // [R, K] and [R] f32: RestoreLogits'
};

// raw and drawn_raw = the logits of `scores` and `drawn_scores` as the model gave them. count,
// places and before as PenalizeLogits took and left them, places ascending by row, then column.
void RestoreLogits(Stream& stream, ConstTensorView count, ConstTensorView places,
                   ConstTensorView before, const ShardAnswers& answers);

// How a row's token is chosen.
enum class Choice : int32_t {
  kNone = 0,      // it is not: the row is padding
  kGreedy = 1,    // the best
  kFiltered = 2,  // drawn from what top-k, top-p and min-p leave of the candidates
  kDrawn = 3,     // drawn from the whole vocabulary, or from what min-p leaves of it: DrawTokens
};
struct TokenFilters {
  double inverse_temperature = 0.0;
  double top_k = 0.0;   // 0 = all
  double top_p = 0.0;   // 1 = all
  double min_p = 0.0;   // 0 = all
  double margin = 0.0;  // how far below the largest score min-p leaves a draw: -inf, or below 0
};
inline constexpr int64_t kTokenFilters = 5;

// What is asked, in device memory like the rest.
struct ChoiceOfRows {
  ConstTensorView shards;    // [S, 2] i32: first id and number of tokens, ids ascending
  ConstTensorView choices;   // [R] i32
  ConstTensorView filters;   // [R, kTokenFilters] f64: TokenFilters
  ConstTensorView seeds;     // [R, 2] i64 (seed, position; as bits)
  ConstTensorView counts;    // [R] i32: candidates asked of each shard
  ConstTensorView logprobs;  // [R] i32: so many of the most probable, at most L; below 0 = not even
                             // the token's own
};
struct ChosenTokens {
  TensorView tokens;                    // [R] i32
  TensorView logprobs;                  // [R] f32
  TensorView top_tokens, top_logprobs;  // [R, L] i32 (-1 = no such token or not asked for), f32
};

// Greedy, or the largest key of those that top-k, then top-p, then min-p leave: the key is score *
// inverse_temperature + GumbelNoise(seed, position, id), on a tie the smaller id's. `first` is
// shard 0's; shard s's answers lie s * shard_bytes behind it (a multiple of 8). A token is -1 where
// the answers do not tell: top-p leaves more than are surely the vocabulary's best (or more than
// kMergedCandidates), so does min-p where it leaves nothing of what a shard has drawn, a shard has
// answered nothing, or what is chosen is no finite number.
inline constexpr int64_t kMergedCandidates = 256;
void ChooseTokens(Stream& stream, const ShardAnswers& first, int64_t shard_bytes,
                  const ChoiceOfRows& rows, const ChosenTokens& chosen);

OpCost RestoreLogitsCost(int64_t rows, int64_t candidates);
OpCost ChooseTokensCost(int64_t rows, int64_t shards, int64_t candidates);

// Of the `certain` first candidates: how many score at least `threshold`; -1 where more may.
template <typename Score>
TRIREME_HOST_DEVICE inline int64_t CountNear(double threshold, int64_t certain, bool complete,
                                             const Score& score) {
  int64_t left = 0;
  while (left < certain && score(left) >= threshold) ++left;
  return left < certain || complete ? left : -1;
}

// Of `count` candidates, best first: how many the filters leave, at least one of what there is; -1
// where top-p would leave more than the `certain` first. mass(i): exp((score - the largest of all)
// * inverse_temperature); `sum`: of all the vocabulary's masses, where top-p is asked without
// top-k. complete: the candidates are the whole vocabulary. One order of additions everywhere.
template <typename Mass>
TRIREME_HOST_DEVICE inline int64_t CountLeft(const TokenFilters& filters, int64_t count,
                                             int64_t certain, bool complete, double sum,
                                             const Mass& mass) {
  int64_t left = certain;
  double total = sum;
  if (filters.top_k > 0) {
    left =
        count < static_cast<int64_t>(filters.top_k) ? count : static_cast<int64_t>(filters.top_k);
    total = 0.0;
    for (int64_t i = 0; i < left; ++i) total += mass(i);
  }
  if (filters.top_p < 1.0) {
    double cumulative = 0.0;
    int64_t nucleus = 0;
    while (nucleus < left && cumulative < filters.top_p * total) cumulative += mass(nucleus++);
    // Rounding may leave the sum of everything just below top_p * total; then all of it is the
    // nucleus.
    if (filters.top_k == 0 && cumulative < filters.top_p * total && !complete) return -1;
    left = nucleus;
  }
  while (left > 1 && mass(left - 1) < filters.min_p) --left;
  return left;
}

}  // namespace trireme
