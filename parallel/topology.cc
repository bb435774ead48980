#include "parallel/topology.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace trireme {
namespace {

int LargestDivisorUpTo(int n, int64_t limit) {
  for (int d = static_cast<int>(std::min<int64_t>(n, limit)); d > 1; --d) {
    if (n % d == 0) return d;
  }
  return 1;
}

// Those that were given.
std::string Flags(int tp, int pp, int dp) {
  std::string out;
  for (const auto& [flag, value] : {std::pair{"--tp ", tp}, {"--pp ", pp}, {"--dp ", dp}}) {
    if (value != 0) absl::StrAppend(&out, out.empty() ? "" : " ", flag, value);
  }
  return out;
}

// Costs of contiguous layer ranges as pipeline stages.
class StageCosts {
 public:
  StageCosts(const std::vector<double>& layers, int stages, double first_extra, double last_extra)
      : stages_(stages), first_extra_(first_extra), last_extra_(last_extra), sums_{0} {
    for (double cost : layers) sums_.push_back(sums_.back() + cost);
  }
  int stages() const { return stages_; }
  int layers() const { return static_cast<int>(sums_.size()) - 1; }
  double Of(int stage, int begin, int end) const {
    double cost = sums_[end] - sums_[begin];
    if (stage == 0) cost += first_extra_;
    if (stage == stages_ - 1) cost += last_extra_;
    return cost;
  }

 private:
  int stages_;
  double first_extra_, last_extra_;
  std::vector<double> sums_;  // sums_[i]: layers [0, i)
};

struct Split {
  double value = 0;
  std::vector<Range> ranges;
};

// Dynamic program over best[s][e]: stages 0..s hold exactly the layers [0, e). `combine(prefix,
// cost)` gives the value of a split from the value of its prefix and the cost of its last stage; it
// must not decrease in either.
template <typename Combine>
Split BestSplit(const StageCosts& costs, Combine combine) {
  const int n = costs.layers(), stages = costs.stages();
  constexpr double kNone = std::numeric_limits<double>::infinity();
  std::vector<std::vector<double>> best(stages, std::vector<double>(n + 1, kNone));
  std::vector<std::vector<int>> begin(stages, std::vector<int>(n + 1, -1));
  for (int e = 1; e <= n; ++e) {
    best[0][e] = combine(0.0, costs.Of(0, 0, e));
    begin[0][e] = 0;
  }
  for (int s = 1; s < stages; ++s) {
    for (int e = s + 1; e <= n; ++e) {
      for (int b = s; b < e; ++b) {
        const double value = combine(best[s - 1][b], costs.Of(s, b, e));
        if (begin[s][e] < 0 || value < best[s][e]) {
          best[s][e] = value;
          begin[s][e] = b;
        }
      }
    }
  }
  Split split{best[stages - 1][n], std::vector<Range>(stages)};
  for (int s = stages - 1, e = n; s >= 0; --s) {
    split.ranges[s] = Range{begin[s][e], e};
    e = begin[s][e];
  }
  return split;
}

}  // namespace

absl::StatusOr<Topology> ResolveTopology(int tp, int pp, int dp, int world_size,
                                         int64_t attention_heads, int64_t layers,
                                         const std::function<bool(int tp)>& tp_fits) {
  CHECK_GE(world_size, 1);
  CHECK_GE(attention_heads, 1);
  CHECK_GE(layers, 1);
  if (tp < 0 || pp < 0 || dp < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(Flags(tp, pp, dp), ": each must be positive, or 0 to have it chosen"));
  }
  if (tp > attention_heads) {
    return absl::InvalidArgumentError(absl::StrCat("--tp ", tp, " is more than the model's ",
                                                   attention_heads, " attention heads"));
  }
  if (pp > layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("--pp ", pp, " is more than the model's ", layers, " layers"));
  }
  // 64 bits: a product of three flags may be anything.
  const int64_t given = int64_t{std::max(tp, 1)} * std::max(pp, 1);
  if (given > world_size || given * std::max(dp, 1) > world_size ||
      world_size % (given * std::max(dp, 1)) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        Flags(tp, pp, dp), ": the product must divide the number of ranks, which is ", world_size));
  }
  Topology topology{tp, pp, dp};
  int rest = static_cast<int>(world_size / (given * std::max(dp, 1)));
  if (tp == 0) {
    topology.tp_size = static_cast<int>(std::gcd(int64_t{rest}, attention_heads));
    while (tp_fits && topology.tp_size > 1 &&
           (rest % topology.tp_size != 0 || !tp_fits(topology.tp_size))) {
      --topology.tp_size;
    }
    rest /= topology.tp_size;
  }
  if (pp == 0) {
    topology.pp_size = LargestDivisorUpTo(rest, layers);
    rest /= topology.pp_size;
  }
  if (dp == 0) {
    topology.dp_size = rest;
    rest = 1;
  }
  if (rest != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(Flags(tp, pp, dp), " (0: chosen) cannot use all ", world_size, " ranks with ",
                     attention_heads, " attention heads and ", layers,
                     " layers: ", Flags(topology.tp_size, topology.pp_size, topology.dp_size),
                     " are ", topology.world_size(), "; start that many ranks, or set --dp 0"));
  }
  return topology;
}

Range PieceOf(int64_t n, int parts, int part, int64_t unit) {
  CHECK_GE(n, 0);
  CHECK_GE(unit, 1);
  CHECK(part >= 0 && part < parts) << "(piece " << part << " of " << parts << ")";
  const int64_t units = (n + unit - 1) / unit;
  const int64_t base = units / parts, larger = units % parts;
  const auto cut = [&](int64_t p) { return std::min(n, (p * base + std::min(p, larger)) * unit); };
  return Range{cut(part), cut(part + 1)};
}

std::vector<Range> SplitLayers(const std::vector<double>& layer_costs, int stages,
                               double first_extra, double last_extra) {
  CHECK_GE(stages, 1);
  CHECK_GE(layer_costs.size(), static_cast<size_t>(stages));
  const StageCosts costs(layer_costs, stages, first_extra, last_extra);
  const double worst =
      BestSplit(costs, [](double prefix, double cost) { return std::max(prefix, cost); }).value;
  // Many splits share the cheapest worst stage; take the most even of them, so that the other
  // stages are not lopsided. The slack lets a sum that was rounded another way still count as
  // equal.
  const double limit = worst + std::abs(worst) * 1e-12;
  return BestSplit(costs,
                   [limit](double prefix, double cost) {
                     return cost > limit ? std::numeric_limits<double>::infinity()
                                         : prefix + cost * cost;
                   })
      .ranges;
}

}  // namespace trireme
