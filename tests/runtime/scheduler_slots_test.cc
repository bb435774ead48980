// Who gets a step's slots: policies, stages, places that become free, and what counts as lost.

#include <gtest/gtest.h>

#include "tests/runtime/scheduler_fixture.h"

namespace trireme {
namespace {

TEST(SchedulerSlotsTest, StaticBatchesWaitForEachOther) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_num_seqs = 2;
  options.policy = BatchPolicy::kStatic;
  Loop loop(options);
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(0, 2, 2)).ok());
  EXPECT_FALSE(loop.Step());  // half a batch
  for (const uint64_t id : {1, 2}) {
    ASSERT_TRUE(loop.scheduler.Add(MakeRequest(id, 2, id == 1 ? 6 : 2)).ok());
  }
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(loop.Step());
  EXPECT_EQ(loop.ended, (std::vector<uint64_t>{0, 1}));  // 2 was not let in when 0 ended
  EXPECT_FALSE(loop.Step());
  loop.scheduler.Drain();
  while (loop.Step()) {
  }
  EXPECT_EQ(loop.ended, (std::vector<uint64_t>{0, 1, 2}));
}

// A slot counts as left empty only while somebody waits for it: static batches lose the places of
// those who have ended, continuous ones do not, and nobody loses the drain at the end.
TEST(SchedulerSlotsTest, EmptySlotsCountWhileSomebodyWaits) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_num_seqs = 2;
  for (const BatchPolicy policy : {BatchPolicy::kStatic, BatchPolicy::kContinuous}) {
    options.policy = policy;
    Loop loop(options);
    for (const uint64_t id : {0, 1, 2}) {
      ASSERT_TRUE(loop.scheduler.Add(MakeRequest(id, 2, id == 1 ? 6 : 2)).ok());
    }
    loop.scheduler.Drain();
    while (loop.Step()) {
    }
    const SchedulerStats& stats = loop.scheduler.stats();
    // Three prompts of two tokens; of each output all but the last token is computed.
    EXPECT_EQ(stats.computed_tokens, 3 * 2 + 1 + 5 + 1);
    // 0 ends with the second step; 1 goes on alone for four more while 2 waits.
    EXPECT_EQ(stats.idle_slots, policy == BatchPolicy::kStatic ? 4 : 0);
    EXPECT_EQ(stats.wasted_tokens, 0);
  }
}

// The place of a sequence whose last token is in flight was empty for a step or two.
TEST(SchedulerSlotsTest, WhoComesNextNeedNotWaitForTheLastResult) {
  for (const int64_t stages : {1, 2}) {
    SchedulerOptions options = Small();
    options.max_num_seqs = 1;
    options.num_pages = 4;
    options.prefix_cache = false;
    options.micro_batches = stages;
    options.lookahead = stages == 1 ? 1 : 0;
    Scheduler scheduler(options);
    FakeRanks ranks(options);
    for (const uint64_t id : {0, 1}) {
      ASSERT_TRUE(scheduler.Add(MakeRequest(id, 13, id == 0 ? 1 : 3)).ok());  // all pages
    }
    StepPlan first, second;
    StepResult first_result, second_result;
    ASSERT_TRUE(scheduler.Next(&first));
    ranks.Execute(first, &first_result);
    ASSERT_TRUE(scheduler.Next(&second)) << "the first is planned to its end";
    ranks.Execute(second, &second_result);
    EXPECT_EQ(scheduler.running(), 2);
    EXPECT_EQ(second.num_tokens(), 13);
    EXPECT_EQ(second.chunks[0].slot, first.chunks[0].slot);
    std::vector<TokenEvent> events;
    scheduler.Commit(first, first_result, &events);
    ASSERT_EQ(events.size(), 1u);
    EXPECT_EQ(events[0].finish, FinishReason::kLength);
    EXPECT_EQ(scheduler.running(), 1);
    ASSERT_TRUE(scheduler.Cancel(1).ok());
    scheduler.Commit(second, second_result, &events);
    EXPECT_EQ(events.size(), 1u) << "cancelled";
    EXPECT_TRUE(scheduler.idle());
    EXPECT_EQ(scheduler.free_pages(), 4);
    EXPECT_EQ(scheduler.stats().idle_slots, 0);
    EXPECT_EQ(ranks.error(), "");
  }
}

// A sequence that has given up its place may still be cancelled, or end with a stop token.
TEST(SchedulerSlotsTest, AnEndingSequenceCanStillBeEnded) {
  SchedulerOptions options = Small();
  options.lookahead = 1;
  for (const bool cancelled : {true, false}) {
    Scheduler scheduler(options);
    Request request = MakeRequest(0, 3, 2);
    request.stop_tokens = {5};
    ASSERT_TRUE(scheduler.Add(request).ok());
    const StepPlan first = NextPlan(scheduler), second = NextPlan(scheduler);
    EXPECT_EQ(scheduler.free_pages(), 4);
    if (cancelled) {
      ASSERT_TRUE(scheduler.Cancel(0).ok());
      EXPECT_TRUE(scheduler.idle());
    }
    const SampledToken stop{.token = 5, .top = {}};
    std::vector<TokenEvent> events;
    scheduler.Commit(first, {.step = first.step, .sampled = {stop}}, &events);
    scheduler.Commit(second, {.step = second.step, .sampled = {stop}}, &events);
    EXPECT_EQ(events.size(), cancelled ? 0u : 1u);
    EXPECT_TRUE(scheduler.idle());
    EXPECT_EQ(scheduler.free_pages(), 4);
    EXPECT_TRUE(NextPlan(scheduler).empty());
  }
}

TEST(SchedulerSlotsTest, TokensComputedAgainOrForNobodyAreWasted) {
  SchedulerOptions options = Small();
  options.num_pages = 6;
  options.prefix_cache = false;
  Loop loop(options);
  for (const uint64_t id : {0, 1}) {
    ASSERT_TRUE(loop.scheduler.Add(MakeRequest(id, 4, 12)).ok());
  }
  int64_t needed = 2 * (4 + 11);
  while (loop.Step()) {
  }
  const SchedulerStats& stats = loop.scheduler.stats();
  ASSERT_GT(stats.preemptions, 0);
  EXPECT_GT(stats.wasted_tokens, 0);
  EXPECT_EQ(stats.computed_tokens - stats.wasted_tokens, needed);

  options.lookahead = 1;
  Scheduler scheduler(options);
  Request request = MakeRequest(2, 3, 9);
  request.stop_tokens = {7};
  ASSERT_TRUE(scheduler.Add(request).ok());
  const StepPlan first = NextPlan(scheduler), second = NextPlan(scheduler);
  const SampledToken stop{.token = 7, .top = {}};
  std::vector<TokenEvent> events;
  scheduler.Commit(first, {.step = first.step, .sampled = {stop}}, &events);
  EXPECT_EQ(scheduler.stats().wasted_tokens, 0);
  scheduler.Commit(second, {.step = second.step, .sampled = {stop}}, &events);
  EXPECT_EQ(scheduler.stats().wasted_tokens, 1) << "computed behind the stop token";
}

TEST(SchedulerSlotsTest, DynamicBatchesWaitForAWhile) {
  SchedulerOptions options = Small();
  options.max_num_seqs = 2;
  options.policy = BatchPolicy::kDynamic;
  options.batch_window_us = 50;
  Loop loop(options);
  Request request = MakeRequest(0, 2, 2);
  request.arrival_us = 1000;
  ASSERT_TRUE(loop.scheduler.Add(request).ok());
  EXPECT_EQ(loop.scheduler.NextTime(), 1050);
  std::vector<TokenEvent> events;
  loop.scheduler.AdvanceTime(1049, &events);
  EXPECT_FALSE(loop.Step());
  loop.scheduler.AdvanceTime(1050, &events);
  EXPECT_TRUE(loop.Step());
}

TEST(SchedulerSlotsTest, DealsRunningSequencesOverTheStages) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.micro_batches = 2;
  Scheduler scheduler(options);
  for (uint64_t i = 0; i < 8; ++i) ASSERT_TRUE(scheduler.Add(MakeRequest(i, 2, 4)).ok());
  EXPECT_EQ(NextPlan(scheduler).chunks.size(), 4u);
  EXPECT_EQ(NextPlan(scheduler).chunks.size(), 4u);
  EXPECT_TRUE(NextPlan(scheduler).empty());
}

// Without room for those who wait, the few that run are still dealt out.
TEST(SchedulerSlotsTest, KeepsAllStagesBusyWhenPagesHoldTheRestBack) {
  SchedulerOptions options = Small();
  options.micro_batches = 3;
  options.num_pages = 6;
  options.page_size = 8;
  Loop loop(options);
  for (uint64_t i = 0; i < 20; ++i) ASSERT_TRUE(loop.scheduler.Add(MakeRequest(i, 9, 7)).ok());
  while (loop.scheduler.running() < 2) ASSERT_TRUE(loop.Step());
  StepPlan first = NextPlan(loop.scheduler), second = NextPlan(loop.scheduler);
  EXPECT_FALSE(first.empty());
  EXPECT_FALSE(second.empty());
}

}  // namespace
}  // namespace trireme
