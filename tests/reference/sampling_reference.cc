#include "tests/reference/sampling_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/philox.h"

namespace trireme::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

}  // namespace

Doubles PenalizeLogits(const std::vector<Penalty>& penalties, int64_t vocabulary, Doubles* logits) {
  Doubles before;
  for (const Penalty& penalty : penalties) {
    double& x = (*logits)[penalty.row * vocabulary + penalty.column];
    before.push_back(x);
    x = x > 0 ? x / penalty.repetition : x * penalty.repetition;
    x -= penalty.subtract;
  }
  return before;
}

LogitSummary SummarizeLogits(const Doubles& row, double inverse_temperature, int64_t count) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < row.size(); ++i) {
    if (!std::isnan(row[i])) order.push_back(static_cast<int32_t>(i));
  }
  // Stable: on a tie the smaller column stays in front.
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  LogitSummary summary;
  summary.largest = order.empty() ? -kInf : row[order[0]];
  for (int32_t column : order) {
    if (inverse_temperature > 0 && summary.largest > -kInf)
      summary.sum += std::exp((row[column] - summary.largest) * inverse_temperature);
  }
  order.resize(count, -1);
  for (int32_t column : order) summary.scores.push_back(column < 0 ? -kInf : row[column]);
  summary.columns = std::move(order);
  return summary;
}

Draw DrawToken(const Doubles& row, uint64_t seed, uint64_t position, double inverse_temperature,
               double threshold, int64_t first_id) {
  Draw draw{-kInf, -1};
  if (inverse_temperature == 0) return draw;
  for (size_t i = 0; i < row.size(); ++i) {
    // Not `<`: a NaN is no candidate.
    if (!(row[i] >= threshold)) continue;
    const uint32_t token = static_cast<uint32_t>(first_id + static_cast<int64_t>(i));
    const double key = row[i] * inverse_temperature + GumbelNoise(seed, position, token);
    if (key > draw.key) draw = {key, static_cast<int32_t>(i)};
  }
  return draw;
}

int32_t ChooseToken(const Doubles& row, const TokenAsked& asked) {
  const LogitSummary all = SummarizeLogits(row, 0.0, static_cast<int64_t>(row.size()));
  std::vector<int32_t> left = all.columns;
  if (asked.greedy) return left[0];
  const auto mass = [&](int32_t id) {
    return std::exp((row[id] - all.largest) * asked.inverse_temperature);
  };
  if (asked.top_k > 0) left.resize(std::min<size_t>(left.size(), asked.top_k));
  double total = 0, cumulative = 0;
  for (const int32_t id : left) total += mass(id);
  if (asked.top_p < 1.0) {
    size_t nucleus = 0;
    while (nucleus < left.size() && cumulative < asked.top_p * total)
      cumulative += mass(left[nucleus++]);
    left.resize(nucleus);
  }
  while (left.size() > 1 && mass(left.back()) < asked.min_p) left.pop_back();
  int32_t best = -1;
  double best_key = -kInf;
  for (const int32_t id : left) {
    const double key = row[id] * asked.inverse_temperature +
                       GumbelNoise(asked.seed, asked.position, static_cast<uint32_t>(id));
    if (key > best_key || (key == best_key && id < best)) best = id, best_key = key;
  }
  return best;
}

}  // namespace trireme::reference
