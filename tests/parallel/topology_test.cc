#include "parallel/topology.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

namespace trireme {
namespace {

TEST(Topology, RankAndCoordinatesAreInverse) {
  const Topology topology{3, 2, 4};
  int rank = 0;
  for (int dp = 0; dp < 4; ++dp) {
    for (int pp = 0; pp < 2; ++pp) {
      for (int tp = 0; tp < 3; ++tp, ++rank) {
        EXPECT_EQ(topology.RankOf(dp, pp, tp), rank);
        EXPECT_EQ(topology.TpIndex(rank), tp);
        EXPECT_EQ(topology.PpIndex(rank), pp);
        EXPECT_EQ(topology.DpIndex(rank), dp);
      }
    }
  }
  EXPECT_EQ(topology.world_size(), rank);
}

struct ResolveCase {
  int tp, pp, dp, world;
  int64_t heads, layers;
  Topology want;
};

TEST(ResolveTopology, FillsInWhatIsLeftAtZero) {
  const ResolveCase cases[] = {
      {0, 0, 0, 1, 8, 4, {1, 1, 1}},   {0, 0, 0, 8, 8, 4, {8, 1, 1}},
      {0, 0, 0, 8, 4, 4, {4, 2, 1}},   // four heads: the rest goes to stages
      {0, 0, 0, 16, 2, 4, {2, 4, 2}},  // then to replicas
      {0, 0, 0, 6, 8, 5, {2, 3, 1}},   // 6 ranks, 8 heads: the common divisor
      {0, 0, 0, 7, 8, 5, {1, 1, 7}},   // 7 divides neither heads nor fits 5 layers
      {0, 2, 0, 8, 32, 16, {4, 2, 1}}, {0, 1, 2, 8, 32, 16, {4, 1, 2}},
      {2, 0, 0, 8, 32, 3, {2, 2, 2}},  // 4 left, at most 3 stages: 2 is the largest divisor
      {2, 2, 2, 8, 32, 16, {2, 2, 2}}, {1, 1, 0, 5, 32, 16, {1, 1, 5}},
      {3, 1, 1, 3, 8, 2, {3, 1, 1}},  // given by the user: whether 3 may cut 8 heads is the model's
                                      // to say
  };
  for (const ResolveCase& c : cases) {
    const auto got = ResolveTopology(c.tp, c.pp, c.dp, c.world, c.heads, c.layers);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(*got, c.want) << c.tp << c.pp << c.dp << " of " << c.world << ": " << got->tp_size
                            << "x" << got->pp_size << "x" << got->dp_size;
  }
}

TEST(ResolveTopology, RejectsWhatDoesNotFitAndNamesIt) {
  const auto message = [](int tp, int pp, int dp, int world, int64_t heads, int64_t layers) {
    const auto got = ResolveTopology(tp, pp, dp, world, heads, layers);
    EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(got.status().message());
  };
  EXPECT_NE(message(3, 0, 0, 4, 8, 8).find("--tp 3"), std::string::npos);
  EXPECT_NE(message(2, 2, 2, 4, 8, 8).find("ranks, which is 4"), std::string::npos);
  EXPECT_NE(message(2, 1, 1, 4, 8, 8).find("all 4 ranks"), std::string::npos);
  EXPECT_NE(message(0, 1, 1, 6, 4, 8).find("--tp 2 --pp 1 --dp 1 are 2"), std::string::npos);
  EXPECT_NE(message(-1, 1, 1, 1, 4, 8).find("--tp -1"), std::string::npos);
  EXPECT_NE(message(16, 1, 1, 16, 4, 8).find("4 attention heads"), std::string::npos);
  EXPECT_NE(message(1, 9, 1, 9, 4, 8).find("8 layers"), std::string::npos);
  const int big = std::numeric_limits<int>::max();
  message(4, 4, big, 4, 8, 8);  // the product overflows an int
}

TEST(ResolveTopology, EveryAnswerUsesAllRanksAndKeepsWhatWasGiven) {
  for (int world = 1; world <= 24; ++world) {
    for (int tp = 0; tp <= 4; ++tp) {
      for (int pp = 0; pp <= 4; ++pp) {
        for (int dp = 0; dp <= 4; ++dp) {
          const auto got = ResolveTopology(tp, pp, dp, world, 8, 6);
          if (!got.ok()) {
            // With replicas left open, whatever divides must be found.
            EXPECT_FALSE(dp == 0 && world % (std::max(tp, 1) * std::max(pp, 1)) == 0)
                << got.status();
            continue;
          }
          EXPECT_EQ(got->world_size(), world);
          if (tp > 0) {
            EXPECT_EQ(got->tp_size, tp);
          }
          if (pp > 0) {
            EXPECT_EQ(got->pp_size, pp);
          }
          if (dp > 0) {
            EXPECT_EQ(got->dp_size, dp);
          }
          if (tp == 0) {
            EXPECT_EQ(8 % got->tp_size, 0);
          }
          EXPECT_LE(got->pp_size, 6);
        }
      }
    }
  }
}

TEST(PieceOf, PiecesCoverWithoutOverlapAndDifferByOneUnit) {
  for (int64_t n = 0; n <= 40; ++n) {
    for (int parts = 1; parts <= 9; ++parts) {
      for (int64_t unit : {1, 2, 3, 8}) {
        int64_t at = 0;
        const int64_t first = PieceOf(n, parts, 0, unit).size();
        int64_t previous = first;
        for (int part = 0; part < parts; ++part) {
          const Range piece = PieceOf(n, parts, part, unit);
          EXPECT_EQ(piece.begin, at);
          EXPECT_TRUE(piece.begin % unit == 0 || piece.begin == n);
          EXPECT_LE(piece.size(), previous);
          // Only what the end of [0, n) cuts off may make a piece shorter than one unit less than
          // the first.
          if (piece.end < n) {
            EXPECT_GE(piece.size(), first - unit);
          }
          at = piece.end;
          previous = piece.size();
        }
        EXPECT_EQ(at, n) << n << " in " << parts << " by " << unit;
      }
    }
  }
}

TEST(PieceOf, Examples) {
  EXPECT_EQ(PieceOf(10, 4, 0), (Range{0, 3}));
  EXPECT_EQ(PieceOf(10, 4, 3), (Range{8, 10}));
  EXPECT_EQ(PieceOf(2, 4, 3), (Range{2, 2}));
  EXPECT_EQ(PieceOf(100, 2, 1, 64), (Range{64, 100}));
}

double Worst(const std::vector<double>& costs, const std::vector<Range>& split, double first,
             double last) {
  double worst = 0;
  for (size_t s = 0; s < split.size(); ++s) {
    double cost = (s == 0 ? first : 0) + (s + 1 == split.size() ? last : 0);
    for (int64_t i = split[s].begin; i < split[s].end; ++i) cost += costs[i];
    worst = std::max(worst, cost);
  }
  return worst;
}

// All ways to cut `costs` from `begin` on into the remaining stages.
double BruteForce(const std::vector<double>& costs, int stages, double first, double last,
                  std::vector<Range>* split) {
  const int64_t n = static_cast<int64_t>(costs.size());
  const int64_t begin = split->empty() ? 0 : split->back().end;
  const int left = stages - static_cast<int>(split->size());
  if (left == 1) {
    split->push_back(Range{begin, n});
    const double worst = Worst(costs, *split, first, last);
    split->pop_back();
    return worst;
  }
  double best = std::numeric_limits<double>::infinity();
  for (int64_t end = begin + 1; end <= n - (left - 1); ++end) {
    split->push_back(Range{begin, end});
    best = std::min(best, BruteForce(costs, stages, first, last, split));
    split->pop_back();
  }
  return best;
}

TEST(SplitLayers, IsAsGoodAsTryingEverySplit) {
  std::mt19937 rng(7);
  for (int round = 0; round < 400; ++round) {
    const int n = 1 + static_cast<int>(rng() % 10);
    const int stages = 1 + static_cast<int>(rng() % n);
    // Whole numbers, so that sums are exact and the comparison needs no tolerance.
    std::vector<double> costs(n);
    for (double& cost : costs) cost = static_cast<double>(rng() % 20);
    const double first = static_cast<double>(rng() % 30), last = static_cast<double>(rng() % 30);
    const std::vector<Range> got = SplitLayers(costs, stages, first, last);
    ASSERT_EQ(got.size(), static_cast<size_t>(stages));
    EXPECT_EQ(got.front().begin, 0);
    EXPECT_EQ(got.back().end, n);
    for (int s = 0; s < stages; ++s) {
      EXPECT_GE(got[s].size(), 1);
      if (s > 0) {
        EXPECT_EQ(got[s].begin, got[s - 1].end);
      }
    }
    std::vector<Range> scratch;
    EXPECT_EQ(Worst(costs, got, first, last), BruteForce(costs, stages, first, last, &scratch));
  }
}

TEST(SplitLayers, IsEvenAmongEquallyGoodSplits) {
  // The head dominates: any split of the first five layers has the same worst stage.
  EXPECT_EQ(SplitLayers({1, 1, 1, 1, 1}, 3, 0, 100), (std::vector<Range>{{0, 2}, {2, 4}, {4, 5}}));
  EXPECT_EQ(SplitLayers({1, 1, 1, 1, 1}, 1, 3, 3), (std::vector<Range>{{0, 5}}));
}

TEST(SplitLayers, CostsThatAreNoSumsOfPowersOfTwo) {
  const std::vector<double> costs(80, 0.1);
  const std::vector<Range> got = SplitLayers(costs, 8, 0, 0);
  for (const Range& range : got) EXPECT_EQ(range.size(), 10);
}

}  // namespace
}  // namespace trireme
