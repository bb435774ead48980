// What bench serving reports, of requests whose times are known.

#include "launch/serving_report.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace trireme {
namespace {

// It used to print both sides and compare nothing.
TEST(ServingReportTest, LittlesLawIsCompared) {
  EXPECT_TRUE((LittlesLaw{.in_system = 0.0, .rate_times_stay = 0.0}.holds()));
  EXPECT_TRUE((LittlesLaw{.in_system = 9.6, .rate_times_stay = 10.0}.holds()));
  EXPECT_TRUE((LittlesLaw{.in_system = 10.0, .rate_times_stay = 9.6}.holds()));
  const LittlesLaw law{.in_system = 10.0, .rate_times_stay = 9.4};
  EXPECT_FALSE(law.holds());
  EXPECT_NEAR(law.difference(), 0.06, 1e-12);
  EXPECT_NE(law.Describe().find("10 requests in the mean"), std::string::npos) << law.Describe();
  EXPECT_NE(law.Describe().find("there were 9.4, a difference of 6.0%"), std::string::npos);
  EXPECT_FALSE((LittlesLaw{.in_system = 1.0, .rate_times_stay = 0.0}.holds()));
}

// A stall of one gap in many was lost when the quantiles were those of each request's mean.
TEST(ServingReportTest, AStallIsSeenBetweenTokensAndNotInTheMean) {
  ServedRequest steady{.submitted = 1.0, .tokens = {}}, stalled{.submitted = 0.5, .tokens = {}};
  for (int i = 0; i < 101; ++i) {
    steady.tokens.push_back(2.0 + 0.01 * i);
    stalled.tokens.push_back(1.0 + 0.01 * i + (i >= 50 ? 3.0 : 0.0));
  }
  const ServedRequest refused{.submitted = 3.0, .tokens = {}},
      single{.submitted = 3.0, .tokens = {3.25}};
  const ServingLatencies out =
      Measure(std::vector<ServedRequest>{steady, stalled, refused, single}, 600.0, 20.0);
  EXPECT_EQ(out.requests, 3);
  EXPECT_EQ(out.tokens, 203);
  ASSERT_EQ(out.first_token.size(), 3u);
  EXPECT_NEAR(out.first_token[0], 1000.0, 1e-6);
  EXPECT_NEAR(out.first_token[2], 250.0, 1e-6);
  ASSERT_EQ(out.inter_token.size(), 200u);
  EXPECT_NEAR(*std::max_element(out.inter_token.begin(), out.inter_token.end()), 3010.0, 1e-6);
  ASSERT_EQ(out.time_per_output_token.size(), 2u);
  EXPECT_NEAR(out.time_per_output_token[0], 10.0, 1e-6);
  EXPECT_NEAR(out.time_per_output_token[1], 40.0, 1e-6);
  EXPECT_NEAR(out.stay_seconds, 2.0 + 4.5 + 0.25, 1e-9);
  // The first comes late, the second is slow, one was refused.
  EXPECT_EQ(out.good, 1);
}

}  // namespace
}  // namespace trireme
