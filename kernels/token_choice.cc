#include "kernels/token_choice.h"

#include "kernels/check.h"
#include "kernels/check_tensor.h"
#include "kernels/op_table.h"

namespace trireme {
namespace {

void CheckAnswers(const ShardAnswers& a) {
  CHECK_EQ(a.scores.shape.rank, 2) << "scores";
  CHECK_EQ(a.raw_scores.shape.rank, 2) << "raw_scores";
  const int64_t rows = a.scores.dim(0), k = a.scores.dim(1), l = a.raw_scores.dim(1);
  CHECK_LE(k, kOrderedCandidates);
  CHECK_LE(l, kOrderedCandidates);
  CheckTensor(a.largest, {rows}, DType::kF32, "largest");
  CheckTensor(a.sum, {rows}, DType::kF64, "sum");
  CheckTensor(a.scores, {rows, k}, DType::kF32, "scores");
  CheckTensor(a.columns, {rows, k}, DType::kI32, "columns");
  CheckTensor(a.keys, {rows}, DType::kF64, "keys");
  CheckTensor(a.drawn_scores, {rows}, DType::kF32, "drawn_scores");
  CheckTensor(a.drawn, {rows}, DType::kI32, "drawn");
  CheckTensor(a.raw_largest, {rows}, DType::kF32, "raw_largest");
  CheckTensor(a.raw_sum, {rows}, DType::kF64, "raw_sum");
  CheckTensor(a.raw_scores, {rows, l}, DType::kF32, "raw_scores");
  CheckTensor(a.raw_columns, {rows, l}, DType::kI32, "raw_columns");
  CheckTensor(a.raw, {rows, k}, DType::kF32, "raw");
  CheckTensor(a.drawn_raw, {rows}, DType::kF32, "drawn_raw");
}

}  // namespace

void RestoreLogits(Stream& stream, ConstTensorView count, ConstTensorView places,
                   ConstTensorView before, const ShardAnswers& answers) {
  CheckAnswers(answers);
  const int64_t most = places.dim(0);
  CheckTensor(count, {1}, DType::kI32, "count");
  CheckTensor(places, {most, 2}, DType::kI32, "places");
  CheckTensor(before, {most}, DType::kF32, "before");
  if (answers.scores.dim(0) == 0) return;
  stream.ops().restore_logits(stream, count, places, before, answers);
}

void ChooseTokens(Stream& stream, const ShardAnswers& first, int64_t shard_bytes,
                  const ChoiceOfRows& rows, const ChosenTokens& chosen) {
  CheckAnswers(first);
  const int64_t r = first.scores.dim(0), l = first.raw_scores.dim(1);
  CHECK_EQ(shard_bytes % 8, 0) << "f64 of other shards would not be aligned";
  CHECK_EQ(rows.shards.shape.rank, 2) << "shards";
  CheckTensor(rows.shards, {rows.shards.dim(0), 2}, DType::kI32, "shards");
  CheckTensor(rows.choices, {r}, DType::kI32, "choices");
  CheckTensor(rows.filters, {r, kTokenFilters}, DType::kF64, "filters");
  CheckTensor(rows.seeds, {r, 2}, DType::kI64, "seeds");
  CheckTensor(rows.counts, {r}, DType::kI32, "counts");
  CheckTensor(rows.logprobs, {r}, DType::kI32, "logprobs");
  CheckTensor(chosen.tokens, {r}, DType::kI32, "tokens");
  CheckTensor(chosen.logprobs, {r}, DType::kF32, "logprobs");
  CheckTensor(chosen.top_tokens, {r, l}, DType::kI32, "top_tokens");
  CheckTensor(chosen.top_logprobs, {r, l}, DType::kF32, "top_logprobs");
  if (r == 0) return;
  stream.ops().choose_tokens(stream, first, shard_bytes, rows, chosen);
}

OpCost RestoreLogitsCost(int64_t rows, int64_t candidates) {
  // Score and column are read, the logit written; of places hardly any.
  return {0.0, 12.0 * rows * (candidates + 1)};
}

OpCost ChooseTokensCost(int64_t rows, int64_t shards, int64_t candidates) {
  // An exponential and a key of each candidate; score, logit and column of each are read.
  const double all = 1.0 * rows * shards * candidates;
  return {100.0 * all, 12.0 * all};
}

}  // namespace trireme
