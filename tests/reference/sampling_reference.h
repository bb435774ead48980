// The naive double-precision twin of every op in kernels/sampling.h, row by row of the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/reference/reference.h"

namespace trireme::reference {

struct Penalty {
  int64_t row = 0;
  int64_t column = 0;
  double repetition = 1.0;
  double subtract = 0.0;
};

// logits [R, V] with V = `vocabulary`, changed; the logits as they were, one each penalty.
Doubles PenalizeLogits(const std::vector<Penalty>& penalties, int64_t vocabulary, Doubles* logits);

// What a row's best columns are, what they score, and the softmax's denominator.
struct LogitSummary {
  double largest = 0;            // -inf: nothing but NaN
  double sum = 0;                // of exp((logit - largest) * inverse_temperature); 0 without it
  std::vector<int32_t> columns;  // [K], the best first; -1 = the row has fewer candidates
  Doubles scores;                // [K]: their logits; -inf
};
LogitSummary SummarizeLogits(const Doubles& row, double inverse_temperature, int64_t count);

struct Draw {
  double key = 0;       // -inf: nothing was left to draw from
  int32_t column = -1;  // the column drawn
};
// The column with the largest noisy logit among those that reach `threshold`.
Draw DrawToken(const Doubles& row, uint64_t seed, uint64_t position, double inverse_temperature,
               double threshold, int64_t first_id);

// What is asked of a row, filters as in kernels/token_choice.h.
struct TokenAsked {
  bool greedy = false;
  double inverse_temperature = 1.0;
  int64_t top_k = 0;
  double top_p = 1.0, min_p = 0.0;
  uint64_t seed = 0, position = 0;
};
// The token, by the definition: the whole vocabulary sorted, top-k, top-p and min-p in turn, then
// the largest noisy logit of what is left. `row` has no NaN.
int32_t ChooseToken(const Doubles& row, const TokenAsked& asked);

}  // namespace trireme::reference
