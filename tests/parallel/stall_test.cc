// Who waits for whom, from made-up states of four ranks in TP 2 x PP 2: tp 0-1 and 2-3, pp 0,2 and
// 1,3.
#include "parallel/stall.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

constexpr double kTimeout = 5.0;
constexpr int kWorld = 0, kTp = 1, kPp = 2;

std::vector<WatchedRank> FourRanks() {
  std::vector<WatchedRank> ranks(4);
  for (int r = 0; r < 4; ++r) {
    ranks[r].host = "node" + std::to_string(r / 2);
    ranks[r].pid = 100 + r;
    RankState& state = ranks[r].state;
    state.rank = r;
    state.phase = Phase::kDecode;
    state.step = 7;
    state.num_groups = 3;
    state.groups[kWorld] = {{"world"}, 0, 1, 4};
    state.groups[kTp] = {{"tp"}, r / 2 * 2, 1, 2};
    state.groups[kPp] = {{"pp"}, r % 2, 2, 2};
  }
  return ranks;
}

void InCall(WatchedRank& rank, CommOp op, int group, uint64_t sequence, int peer = -1) {
  rank.state.in_call = true;
  rank.state.last = {.sequence = 1, .op = op, .group = group, .peer = peer, .bytes = 256};
  rank.state.last.group_sequence = sequence;
  rank.state.last_age_ns = 6'000'000'000;
  if (sequence > 0) rank.state.entered[group] = sequence;
  rank.still_s = 6.0;
}

// Rank 2 is in no call; rank 3 waits for it in an all-reduce, rank 0 for rank 2's result, rank 1
// for rank 0's plan.
std::vector<WatchedRank> AllWaitForRank2() {
  std::vector<WatchedRank> ranks = FourRanks();
  InCall(ranks[0], CommOp::kReceive, kWorld, 0, 2);
  InCall(ranks[1], CommOp::kReceive, kWorld, 0, 0);
  ranks[2].state.entered[kTp] = 52;
  InCall(ranks[3], CommOp::kAllReduce, kTp, 53);
  ranks[2].still_s = 6.0;
  return ranks;
}

TEST(FindStall, NothingWhileCallsAreYoung) {
  std::vector<WatchedRank> ranks = AllWaitForRank2();
  for (WatchedRank& rank : ranks) rank.still_s = 4.0;
  EXPECT_FALSE(FindStall(ranks, kTimeout).has_value());
}

TEST(FindStall, ARankThatNeverEntered) {
  const std::vector<WatchedRank> ranks = AllWaitForRank2();
  const auto stall = FindStall(ranks, kTimeout);
  ASSERT_TRUE(stall.has_value());
  EXPECT_EQ(stall->kind, Failure::Kind::kStuck);
  EXPECT_EQ(stall->ranks, std::vector<int>{2});
  EXPECT_EQ(
      FailureLine(*stall, ranks),
      "rank 2 (node1, pid 102) is stuck in decode, step 7: no progress for 6.0 s while others "
      "wait for it");
  const std::string table = FailureTable(*stall, ranks);
  EXPECT_NE(table.find("all_reduce #53 of tp 2-3: entered by 3, never by 2\n"), std::string::npos)
      << table;
  EXPECT_NE(table.find("for 6.0 s in receive from rank 2, 256 B"), std::string::npos) << table;
}

TEST(FindStall, ALongComputationIsNone) {
  std::vector<WatchedRank> ranks = AllWaitForRank2();
  ranks[2].still_s = 0.1;  // its thread works
  EXPECT_FALSE(FindStall(ranks, kTimeout).has_value());
}

TEST(FindStall, ARankThatWaitsForItsReaderIsNone) {
  std::vector<WatchedRank> ranks = AllWaitForRank2();
  ranks[2].state.outside = true;
  EXPECT_FALSE(FindStall(ranks, kTimeout).has_value());
}

TEST(FindStall, ARankThatIdlesWhileNobodyWaitsIsNone) {
  std::vector<WatchedRank> ranks = FourRanks();
  ranks[1].still_s = 100.0;
  EXPECT_FALSE(FindStall(ranks, kTimeout).has_value());
}

// All have entered; one of them does not even poll.
TEST(FindStall, FrozenInsideOfACall) {
  std::vector<WatchedRank> ranks = AllWaitForRank2();
  InCall(ranks[2], CommOp::kAllReduce, kTp, 53);
  ranks[2].no_cpu_s = 6.0;
  const auto stall = FindStall(ranks, kTimeout);
  ASSERT_TRUE(stall.has_value());
  EXPECT_EQ(stall->kind, Failure::Kind::kStuck);
  EXPECT_EQ(stall->ranks, std::vector<int>{2});
  EXPECT_NE(FailureLine(*stall, ranks).find("in all_reduce #53 of tp 2-3, 256 B"),
            std::string::npos);
}

TEST(FindStall, RanksInDifferentCallsWaitForEachOther) {
  std::vector<WatchedRank> ranks = FourRanks();
  InCall(ranks[0], CommOp::kAllReduce, kTp, 9);
  InCall(ranks[1], CommOp::kBarrier, kWorld, 4);
  InCall(ranks[2], CommOp::kBarrier, kWorld, 4);
  InCall(ranks[3], CommOp::kBarrier, kWorld, 4);
  ranks[0].state.entered[kWorld] = 3;
  ranks[1].state.entered[kTp] = 8;
  const auto stall = FindStall(ranks, kTimeout);
  ASSERT_TRUE(stall.has_value());
  EXPECT_EQ(stall->kind, Failure::Kind::kDeadlock);
  EXPECT_EQ(stall->ranks, (std::vector<int>{0, 1, 2, 3}));
}

// The other ranks' failure must not wait for this one's long computation.
TEST(FindStall, AFrozenRankBesideABusyOne) {
  std::vector<WatchedRank> ranks = FourRanks();
  for (const int r : {0, 3}) {
    InCall(ranks[r], CommOp::kBarrier, kWorld, 4);
  }
  ranks[1].still_s = 0.1;
  ranks[2].still_s = 6.0;
  for (const int r : {1, 2}) ranks[r].state.entered[kWorld] = 3;
  const auto stall = FindStall(ranks, kTimeout);
  ASSERT_TRUE(stall.has_value());
  EXPECT_EQ(stall->ranks, std::vector<int>{2});
}

TEST(FindStall, ARankThatHasLeft) {
  std::vector<WatchedRank> ranks = AllWaitForRank2();
  ranks[2].presence = WatchedRank::Presence::kLeft;
  const auto stall = FindStall(ranks, kTimeout);
  ASSERT_TRUE(stall.has_value());
  EXPECT_EQ(stall->ranks, std::vector<int>{2});
}

// 1 GB on a slow network takes longer than the timeout.
TEST(FindStall, BytesTakeTime) {
  std::vector<WatchedRank> ranks = FourRanks();
  for (WatchedRank& rank : ranks) {
    InCall(rank, CommOp::kBroadcast, kWorld, 4);
    rank.state.last.bytes = -1;
  }
  ranks[0].state.last.bytes = 1'000'000'000;
  EXPECT_FALSE(FindStall(ranks, kTimeout).has_value());
  for (WatchedRank& rank : ranks) rank.still_s = 106.0;
  EXPECT_TRUE(FindStall(ranks, kTimeout).has_value());
}

TEST(FailureTable, OfAThousandRanksShowsThoseThatMatter) {
  std::vector<WatchedRank> ranks(1000);
  for (int r = 0; r < 1000; ++r) ranks[r].state.rank = r;
  ranks[777].presence = WatchedRank::Presence::kDead;
  const std::string table = FailureTable({Failure::Kind::kDied, {777}, ""}, ranks);
  EXPECT_LT(table.size(), 4000u);
  EXPECT_NE(table.find(" 777 "), std::string::npos);
  EXPECT_NE(table.find("and 967 more"), std::string::npos) << table;
}

TEST(FailureLine, SaysHow) {
  std::vector<WatchedRank> ranks = FourRanks();
  const auto line = [&](Failure::Kind kind) { return FailureLine({kind, {1}, "why"}, ranks); };
  EXPECT_EQ(line(Failure::Kind::kDied), "rank 1 (node0, pid 101) died in decode, step 7");
  EXPECT_EQ(line(Failure::Kind::kError), "rank 1 (node0, pid 101) failed in decode, step 7: why");
  ranks[1].silent_s = 5.2;
  EXPECT_EQ(line(Failure::Kind::kSilent),
            "rank 1 (node0, pid 101) gave no sign of life for 5.2 s in decode, step 7");
  ranks[1].stopped = true;
  EXPECT_EQ(line(Failure::Kind::kSilent),
            "rank 1 (node0, pid 101) is stopped (SIGSTOP, or a debugger) in decode, step 7");
  ranks[1].state.phase = Phase::kLoad;
  EXPECT_EQ(line(Failure::Kind::kDied), "rank 1 (node0, pid 101) died in load");
  EXPECT_EQ(FailureLine({Failure::Kind::kLauncherGone, {}, "mpirun is gone"}, ranks),
            "mpirun is gone");
}

}  // namespace
}  // namespace trireme
