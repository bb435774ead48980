#include "kernels/sampling.h"

#include "kernels/check.h"
#include "kernels/check_tensor.h"
#include "kernels/op_table.h"

namespace trireme {
namespace {

void CheckLogits(ConstTensorView logits) {
  CHECK_EQ(logits.shape.rank, 2) << "logits";
  CheckTensor(logits, logits.shape, DType::kF32, "logits");
}

}  // namespace

void PenalizeLogits(Stream& stream, TensorView logits, ConstTensorView count,
                    ConstTensorView places, ConstTensorView amounts, TensorView before) {
  CheckLogits(logits);
  const int64_t most = places.dim(0);
  CheckTensor(count, {1}, DType::kI32, "count");
  CheckTensor(places, {most, 2}, DType::kI32, "places");
  CheckTensor(amounts, {most, 2}, DType::kF32, "amounts");
  CheckTensor(before, {most}, DType::kF32, "before");
  if (most > 0) stream.ops().penalize_logits(stream, logits, count, places, amounts, before);
}

void SummarizeLogits(Stream& stream, ConstTensorView logits, ConstTensorView inverse_temperature,
                     ConstTensorView counts, TensorView largest, TensorView sum, TensorView scores,
                     TensorView columns) {
  CheckLogits(logits);
  const int64_t rows = logits.dim(0), count = scores.dim(1);
  CheckTensor(inverse_temperature, {rows}, DType::kF64, "inverse_temperature");
  CheckTensor(counts, {rows}, DType::kI32, "counts");
  CheckTensor(largest, {rows}, DType::kF32, "largest");
  CheckTensor(sum, {rows}, DType::kF64, "sum");
  CheckTensor(scores, {rows, count}, DType::kF32, "scores");
  CheckTensor(columns, {rows, count}, DType::kI32, "columns");
  if (rows == 0) return;
  stream.ops().summarize_logits(stream, logits, inverse_temperature, counts, largest, sum, scores,
                                columns);
}

void DrawTokens(Stream& stream, ConstTensorView logits, ConstTensorView seeds,
                ConstTensorView limits, ConstTensorView largest, int64_t first_id, TensorView keys,
                TensorView scores, TensorView columns) {
  CheckLogits(logits);
  const int64_t rows = logits.dim(0);
  CheckTensor(seeds, {rows, 2}, DType::kI64, "seeds");
  CheckTensor(limits, {rows, 2}, DType::kF64, "limits");
  CheckTensor(largest, {rows}, DType::kF32, "largest");
  CheckTensor(keys, {rows}, DType::kF64, "keys");
  CheckTensor(scores, {rows}, DType::kF32, "scores");
  CheckTensor(columns, {rows}, DType::kI32, "columns");
  if (rows == 0) return;
  stream.ops().draw_tokens(stream, logits, seeds, limits, largest, first_id, keys, scores, columns);
}

OpCost PenalizeLogitsCost(int64_t penalties) {
  // Place, amounts and logit are read, the logit twice written: changed and as it was.
  return {2.0 * penalties, (8.0 + 8.0 + 4.0 + 2 * 4.0) * penalties};
}

OpCost SummarizeLogitsCost(int64_t rows, int64_t vocabulary) {
  return {2.0 * rows * vocabulary, 4.0 * rows * vocabulary};
}

OpCost DrawTokensCost(int64_t rows, int64_t vocabulary) {
  // Philox: ten rounds of two products and six other operations.
  return {85.0 * rows * vocabulary, 4.0 * rows * vocabulary};
}

}  // namespace trireme
