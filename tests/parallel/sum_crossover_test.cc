#include "parallel/nccl/sum_crossover.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace trireme {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

SumLimits Of(const std::vector<SumTimes>& times) { return CrossoverOf(times); }

TEST(SumCrossover, EachWayUpToTheLastSizeThatItWins) {
  EXPECT_EQ(Of({{4096, 5, 8, 12}, {65536, 8, 9, 13}, {262144, 20, 14, 15}, {1 << 20, 70, 40, 30}}),
            (SumLimits{.one_shot = 65536, .two_shot = 262144}));
}

TEST(SumCrossover, AWayThatDoesNotWinTakesNothing) {
  // Slow peers: everything is NCCL's.
  EXPECT_EQ(Of({{4096, 15, 18, 12}, {65536, 18, 19, 13}}), (SumLimits{}));
  // One-shot up to where NCCL begins: two ranks.
  EXPECT_EQ(Of({{4096, 5, 8, 12}, {65536, 30, 31, 13}}),
            (SumLimits{.one_shot = 4096, .two_shot = 4096}));
  // Two-shot from the beginning.
  EXPECT_EQ(Of({{4096, 9, 8, 12}, {65536, 30, 12, 13}}),
            (SumLimits{.one_shot = 0, .two_shot = 65536}));
}

TEST(SumCrossover, ASizeThatDoesNotFitIsNotTaken) {
  EXPECT_EQ(Of({{4096, 5, 8, 12}, {65536, kNever, 9, 13}, {1 << 20, kNever, kNever, 15}}),
            (SumLimits{.one_shot = 4096, .two_shot = 65536}));
  EXPECT_EQ(Of({{4096, kNever, kNever, kNever}}), (SumLimits{}));
}

TEST(SumCrossover, OneLuckyTimeBehindALossChangesNothing) {
  EXPECT_EQ(Of({{4096, 5, 8, 12}, {16384, 14, 15, 12}, {65536, 8, 9, 13}}),
            (SumLimits{.one_shot = 4096, .two_shot = 4096}));
}

TEST(SumCrossover, NothingMeasuredIsNccls) { EXPECT_EQ(Of({}), (SumLimits{})); }

}  // namespace
}  // namespace trireme
