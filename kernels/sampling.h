// What sampling needs of a shard's logits, on the device that has them: the rest (merging the
// shards, filters, the choice) takes only these small results, by token_choice.h on the device, or
// by runtime/sampler on the host where more of them are needed than lie ready. Rules as in ops.h; R
// rows, V tokens of this shard, P penalties, K candidates.
//
// Scores order totally: the higher first, on a tie the smaller column. A NaN is no candidate and
// adds nothing.
#pragma once

#include <cstdint>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace trireme {

// What is asked of a row lies in device memory, so that a captured call serves rows of all kinds.

// logits[row, column] = x / repetition where x > 0, else x * repetition, minus `subtract`.
// logits [R, V] f32, count [1] i32: so many of the P places are there, the others are not looked
// at. places [P, 2] i32 (row, column), each at most once, amounts [P, 2] f32 (repetition,
// subtract). before [P] f32 = the logits as they were.
void PenalizeLogits(Stream& stream, TensorView logits, ConstTensorView count,
                    ConstTensorView places, ConstTensorView amounts, TensorView before);

// Of every row: its largest logit, the sum of exp((logit - largest) * inverse_temperature), and its
// `counts` best logits with their columns: best first for at most kOrderedCandidates, else in any
// order. logits [R, V] f32, inverse_temperature [R] f64 (0 = the sum is not wanted and is 0),
// counts [R] i32 (at most K), largest [R] f32 (-inf if none), sum [R] f64, scores [R, K] f32,
// columns [R, K] i32 (-1 = the row has fewer candidates, or fewer are wanted). A row that asks for
// no sum and no candidate is left out: its largest is -inf. Terms of the sum are rounded to fp32,
// the sum itself is f64.
inline constexpr int kOrderedCandidates = 512;
void SummarizeLogits(Stream& stream, ConstTensorView logits, ConstTensorView inverse_temperature,
                     ConstTensorView counts, TensorView largest, TensorView sum, TensorView scores,
                     TensorView columns);

// One draw from each row's softmax by the Gumbel-max trick: the column with the largest key
// logit * inverse_temperature + GumbelNoise(seed, position, first_id + column) among the logits >=
// largest + margin. logits [R, V] f32, seeds [R, 2] i64 (seed, position; as bits), limits [R, 2]
// f64 (inverse_temperature, margin: -inf, or below 0), largest [R] f32, which without a margin may
// be any number but +inf. keys [R] f64 (-inf if nothing is left), scores [R] f32: the logits drawn,
// columns [R] i32 (-1). inverse_temperature 0: the row is left out.
void DrawTokens(Stream& stream, ConstTensorView logits, ConstTensorView seeds,
                ConstTensorView limits, ConstTensorView largest, int64_t first_id, TensorView keys,
                TensorView scores, TensorView columns);

OpCost PenalizeLogitsCost(int64_t penalties);
OpCost SummarizeLogitsCost(int64_t rows, int64_t vocabulary);
OpCost DrawTokensCost(int64_t rows, int64_t vocabulary);

}  // namespace trireme
