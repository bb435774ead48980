// What ranks that wait in MPI_Init say of those that do not come.
#include "launch/start_watch.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

TEST(JudgeStart, NamesWhoIsMissing) {
  const StartVerdict verdict =
      JudgeStart({{0, 70, true, false, false}, {1, 71, false, false, false}}, 2, 60, "a");
  EXPECT_EQ(verdict.missing, std::vector<int>{1});
  EXPECT_EQ(verdict.line,
            "rank 1 (a, pid 71) has not come to MPI_Init: others wait for 60 s (--start-timeout)");
}

TEST(JudgeStart, AStoppedRankIsMissingWhereverItStands) {
  const StartVerdict verdict = JudgeStart(
      {{4, 70, true, true, false}, {5, 71, true, false, false}, {6, 72, false, true, false}}, 8,
      0.5, "node2");
  EXPECT_EQ(verdict.missing, (std::vector<int>{0, 2}));
  EXPECT_EQ(
      verdict.line,
      "rank 4 (node2, pid 70) is stopped (SIGSTOP, or a debugger) in init; rank 6 (node2, pid "
      "72) is stopped (SIGSTOP, or a debugger) in init: others wait for 0.5 s "
      "(--start-timeout)");
}

TEST(JudgeStart, NobodyIsMissingHere) {
  const std::vector<StartingRank> here = {{0, 70, true, false, false}, {1, 71, true, false, false}};
  EXPECT_TRUE(JudgeStart(here, 2, 60, "a").missing.empty());
  EXPECT_NE(JudgeStart(here, 2, 60, "a").line.find("all ranks are in MPI_Init"), std::string::npos);
  const std::string line = JudgeStart(here, 4, 60, "a").line;
  EXPECT_NE(line.find("ranks 0, 1 (a) wait in MPI_Init for 60 s"), std::string::npos) << line;
  EXPECT_NE(line.find("of other hosts have not come"), std::string::npos) << line;
}

}  // namespace
}  // namespace trireme
