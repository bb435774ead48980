// Single rules of the scheduler, each in the smallest situation that shows it. Random traffic is in
// scheduler_property_test.cc.

#include "runtime/scheduler.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/runtime/scheduler_fixture.h"

namespace trireme {
namespace {

TEST(SchedulerTest, RefusesWhatCanNeverRunAndNamesTheLimit) {
  Scheduler scheduler(Small());
  const auto refusal = [&](Request request) {
    return std::string(scheduler.Add(std::move(request)).message());
  };
  EXPECT_NE(refusal(MakeRequest(1, 0, 1)).find("prompt is empty"), std::string::npos);
  EXPECT_NE(refusal(MakeRequest(1, 16, 1)).find("--max-model-len 16"), std::string::npos);
  EXPECT_NE(refusal(MakeRequest(1, 1, 0)).find("max-tokens"), std::string::npos);
  Request bad = MakeRequest(1, 1, 1);
  bad.n = 0;
  EXPECT_NE(refusal(bad).find("n is 0; it must be between 1 and 1024"), std::string::npos);
  bad.n = 1;
  bad.sampling.top_p = 2.0f;
  EXPECT_NE(refusal(bad).find("top-p is 2"), std::string::npos);
  SchedulerOptions tight = Small();
  tight.num_pages = 2;
  Scheduler few(tight);
  EXPECT_NE(few.Add(MakeRequest(1, 8, 8)).message().find("--kv-cache-memory"), std::string::npos);
  EXPECT_TRUE(scheduler.Add(MakeRequest(1, 1, 1)).ok());
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 1, 1)).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(scheduler.Cancel(7).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(scheduler.Cancel(1, 1).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(scheduler.Cancel(1, 0).ok());
  EXPECT_EQ(scheduler.Cancel(1).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(scheduler.idle());
}

TEST(SchedulerTest, PrefillChunksOfOnePromptFollowEachOtherThroughThePipeline) {
  SchedulerOptions options = Small();
  options.micro_batches = 2;
  options.max_num_batched_tokens = 5;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 10, 2)).ok());
  const StepPlan first = NextPlan(scheduler), second = NextPlan(scheduler);
  EXPECT_EQ(first.chunks[0].logit_rows, LogitRows::kNone);
  EXPECT_EQ(second.chunks[0].position, 5);
  EXPECT_EQ(second.chunks[0].logit_rows, LogitRows::kLast);
  EXPECT_TRUE(NextPlan(scheduler).empty());
}

TEST(SchedulerTest, MixesDecodesAndPromptsUnderOneBudget) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_num_batched_tokens = 6;
  Loop loop(options);
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(0, 2, 8)).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(1, 12, 2)).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_EQ(loop.plan.chunks.size(), 2u);
  EXPECT_TRUE(loop.plan.chunks[0].decode);
  EXPECT_FALSE(loop.plan.chunks[1].decode);
  EXPECT_EQ(loop.plan.chunks[1].num_tokens, 5);
}

// The last one in gives its pages back, is computed again, and nobody's tokens change (FakeRanks
// checks them).
TEST(SchedulerTest, PreemptsTheYoungestOfTheLowestPriority) {
  SchedulerOptions options = Small();
  options.num_pages = 6;
  options.prefix_cache = false;
  options.ageing_steps = 1000;
  Loop loop(options);
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(0, 4, 12, 0)).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(1, 4, 12, 1)).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(2, 4, 12, 1)).ok());
  while (loop.Step()) {
  }
  EXPECT_GT(loop.scheduler.stats().preemptions, 0);
  // The old one of low priority was overtaken by both others.
  EXPECT_EQ(loop.ended, (std::vector<uint64_t>{1, 2, 0}));
  EXPECT_EQ(loop.scheduler.free_pages(), 6);
}

// A request is overtaken for at most ageing_steps steps a priority.
TEST(SchedulerTest, WaitingMakesUpForPriority) {
  SchedulerOptions options = Small();
  options.max_num_seqs = 1;
  options.ageing_steps = 10;
  Loop loop(options);
  uint64_t next = 1;
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(next++, 1, 2, 3)).ok());
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(0, 1, 2, 0)).ok());
  int steps = 0;
  while (loop.ended.empty() || loop.ended.back() != 0) {
    ASSERT_TRUE(loop.scheduler.Add(MakeRequest(next++, 1, 2, 3)).ok());
    ASSERT_TRUE(loop.Step());
    ASSERT_LT(++steps, 3 * 10 * 2 + 8) << "overtaken for ever";
  }
  EXPECT_GT(steps, 20);  // priority is worth something, too
}

// Decodes that do not all fit into the budget take turns.
TEST(SchedulerTest, DecodesTakeTurns) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_num_batched_tokens = 2;
  Loop loop(options);
  for (uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(loop.scheduler.Add(MakeRequest(i, 1, 8)).ok());
  std::vector<int> tokens(4);
  for (int step = 0; step < 10; ++step) {
    ASSERT_TRUE(loop.Step());
    for (const TokenEvent& event : loop.events) ++tokens[event.request_id];
  }
  const auto [least, most] = std::minmax_element(tokens.begin(), tokens.begin() + 2);
  EXPECT_LE(*most - *least, 1);
}

TEST(SchedulerTest, CancelledPagesAreFreeAtOnce) {
  Scheduler scheduler(Small());
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 8, 8)).ok());
  const StepPlan plan = NextPlan(scheduler);
  ASSERT_TRUE(scheduler.Cancel(0).ok());
  EXPECT_EQ(scheduler.free_pages(), 4);
  EXPECT_TRUE(scheduler.idle());
  std::vector<TokenEvent> events;
  scheduler.Commit(plan, {.step = plan.step, .sampled = {SampledToken{.token = 5, .top = {}}}},
                   &events);
  EXPECT_TRUE(events.empty());
}

// Token -1: the ranks found no finite logit. Nothing of what led to it is given to others.
TEST(SchedulerTest, ASampleWithoutATokenEndsAlone) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 9, 4)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 9, 4)).ok());
  StepPlan plan = NextPlan(scheduler);
  ASSERT_EQ(plan.chunks.size(), 2u);
  const SampledToken none{}, some{.token = 5, .top = {}};
  std::vector<TokenEvent> events;
  scheduler.Commit(plan, {.step = plan.step, .sampled = {none, some}}, &events);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].finish, FinishReason::kError);
  EXPECT_EQ(events[0].sampled.token, -1);
  EXPECT_EQ(events[1].finish, FinishReason::kNone);
  EXPECT_EQ(scheduler.running(), 1);
  EXPECT_EQ(scheduler.free_pages(), 64 - 3);
  EXPECT_EQ(scheduler.kept_pages(), 0);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 9, 4)).ok()) << "its id is free";
  plan = NextPlan(scheduler);
  EXPECT_EQ(plan.num_tokens(), 1 + 9) << "computed anew";
}

TEST(SchedulerTest, DeadlinesEndRequestsWaitingAndRunning) {
  SchedulerOptions options = Small();
  options.max_num_seqs = 1;
  Loop loop(options);
  Request running = MakeRequest(0, 4, 8), waiting = MakeRequest(1, 4, 8);
  running.deadline_us = 100;
  waiting.deadline_us = 90;
  ASSERT_TRUE(loop.scheduler.Add(running).ok());
  ASSERT_TRUE(loop.scheduler.Add(waiting).ok());
  ASSERT_TRUE(loop.Step());
  EXPECT_EQ(loop.scheduler.NextTime(), 90);
  std::vector<TokenEvent> events;
  loop.scheduler.AdvanceTime(89, &events);
  EXPECT_TRUE(events.empty());
  loop.scheduler.AdvanceTime(100, &events);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].finish, FinishReason::kDeadline);
  EXPECT_TRUE(loop.scheduler.idle());
  EXPECT_EQ(loop.scheduler.NextTime(), std::numeric_limits<int64_t>::max());
}

TEST(SchedulerTest, EqualBeginningsAreComputedOnce) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_model_len = 64;
  Loop loop(options);
  Request first = MakeRequest(0, 30, 2), second = MakeRequest(1, 30, 2);
  std::copy_n(first.prompt.begin(), 21, second.prompt.begin());
  ASSERT_TRUE(loop.scheduler.Add(first).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_TRUE(loop.scheduler.Add(second).ok());
  ASSERT_TRUE(loop.Step());
  ASSERT_EQ(loop.plan.chunks.size(), 2u);
  EXPECT_EQ(loop.plan.chunks[1].position, 20);  // five whole pages
  EXPECT_EQ(loop.plan.chunks[1].num_tokens, 10);
  EXPECT_EQ(loop.scheduler.stats().cached_tokens, 20);
}

// A request that goes on where another run was cut short: its output is computed like a prompt, in
// chunks, none of it is handed out again, and what follows are the tokens it would have had.
TEST(SchedulerTest, OutputThatIsAlreadyThereIsComputedLikeAPrompt) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_model_len = 64;
  options.max_num_batched_tokens = 6;
  Request request = MakeRequest(0, 10, 12);
  request.sampling.seed = 5;
  const std::vector<TokenId> whole = FakeRanks::Alone(request, 0, options);
  ASSERT_EQ(whole.size(), 12u);
  request.output.assign(whole.begin(), whole.begin() + 5);
  for (const int64_t lookahead : {0, 1}) {
    options.lookahead = lookahead;
    Loop loop(options);
    ASSERT_TRUE(loop.scheduler.Add(request).ok());
    std::vector<TokenId> tokens(request.output), computed;
    std::vector<int32_t> chunks;
    while (loop.Step()) {
      if (tokens.size() == request.output.size() || chunks.size() < 3) {
        ASSERT_EQ(loop.plan.chunks.size(), 1u);
        EXPECT_FALSE(loop.plan.chunks[0].decode);
        chunks.push_back(loop.plan.chunks[0].num_tokens);
        computed.insert(computed.end(), loop.plan.tokens.begin(), loop.plan.tokens.end());
      }
      for (const NewSequence& added : loop.plan.new_sequences) {
        EXPECT_EQ(added.prompt_tokens, 10) << "penalties tell prompt from output";
      }
      for (const TokenEvent& event : loop.events) {
        tokens.push_back(event.sampled.token);
        EXPECT_EQ(event.finish, tokens.size() == 12 ? FinishReason::kLength : FinishReason::kNone);
      }
    }
    EXPECT_EQ(chunks, (std::vector<int32_t>{6, 6, 3}));
    std::vector<TokenId> known = request.prompt;
    known.insert(known.end(), request.output.begin(), request.output.end());
    EXPECT_EQ(computed, known);
    EXPECT_EQ(tokens, whole);
    EXPECT_EQ(loop.ended, std::vector<uint64_t>{0});
  }
  Scheduler scheduler(options);
  const auto refusal = [&] { return std::string(scheduler.Add(request).message()); };
  request.n = 2;
  EXPECT_NE(refusal().find("one sample"), std::string::npos);
  request.n = 1;
  request.output = whole;
  EXPECT_NE(refusal().find("12 tokens of output already"), std::string::npos);
}

// Samples of one prompt: it is computed once; the page that its end shares with the first output
// tokens is copied.
TEST(SchedulerTest, SamplesShareTheirPrompt) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.max_model_len = 64;
  for (const bool cached : {true, false}) {
    options.prefix_cache = cached;
    Loop loop(options);
    Request request = MakeRequest(0, 22, 6);
    request.n = 3;
    ASSERT_TRUE(loop.scheduler.Add(request).ok());
    ASSERT_TRUE(loop.Step());
    EXPECT_EQ(loop.plan.num_tokens(), 22);
    ASSERT_TRUE(loop.Step());
    ASSERT_EQ(loop.plan.chunks.size(), 3u);
    EXPECT_EQ(loop.plan.num_tokens(), 3);
    EXPECT_EQ(loop.plan.page_copies.size(), 2u);
    EXPECT_EQ(loop.scheduler.free_pages(), 64 - 6 - 2);
    while (loop.Step()) {
    }
    EXPECT_EQ(loop.ended.size(), 3u);
    EXPECT_EQ(loop.scheduler.free_pages(), 64);
  }
}

TEST(SchedulerTest, PagesBehindTheWindowAreGivenBack) {
  SchedulerOptions options = Small();
  options.num_pages = 4;
  options.max_model_len = 400;
  options.sliding_window = 6;
  options.max_num_batched_tokens = 4;
  Loop loop(options);
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(0, 30, 300)).ok());  // 83 pages without a window
  int64_t least = 4;
  while (loop.Step()) least = std::min(least, loop.scheduler.free_pages());
  EXPECT_EQ(loop.ended.size(), 1u);
  EXPECT_LE(least, 1);
}

// A request used to hold all pages of a beginning that the cache knew, found no room to go on from,
// let go of them, and did so for ever.
TEST(SchedulerTest, PagesBehindTheWindowAreNotTakenFromTheCache) {
  SchedulerOptions options = Small();
  options.num_pages = 6;  // a window's, and two
  options.max_model_len = 64;
  options.sliding_window = 16;
  Loop loop(options);
  Request request = MakeRequest(0, 24, 1);
  const std::vector<TokenId> beginning = request.prompt;
  ASSERT_TRUE(loop.scheduler.Add(request).ok());
  while (loop.Step()) {
  }
  ASSERT_EQ(loop.scheduler.kept_pages(), 6);
  request = MakeRequest(1, 44, 4);
  std::copy(beginning.begin(), beginning.end(), request.prompt.begin());
  ASSERT_TRUE(loop.scheduler.Add(request).ok());
  ASSERT_TRUE(loop.Step()) << "it waits for ever";
  EXPECT_EQ(loop.plan.new_sequences[0].computed_tokens, 24);
  EXPECT_EQ(loop.scheduler.free_pages(), 0) << "four of the window, two for its first chunk";
  EXPECT_EQ(loop.plan.num_tokens(), 2 * 4);
  while (loop.Step()) {
  }
  EXPECT_EQ(loop.ended, (std::vector<uint64_t>{0, 1}));
  EXPECT_EQ(loop.scheduler.free_pages(), 6);
}

// So that a prompt which comes again finds the beginning of its pages, not their end, which is no
// use without it.
TEST(SchedulerTest, OfPagesBehindTheWindowTheLastGoesFirst) {
  SchedulerOptions options = Small();
  options.num_pages = 5;
  options.max_model_len = 64;
  options.sliding_window = 4;
  Loop loop(options);
  const Request again = MakeRequest(0, 17, 2);
  ASSERT_TRUE(loop.scheduler.Add(again).ok());  // its second step sees the last two pages
  while (loop.Step()) {
  }
  ASSERT_EQ(loop.scheduler.kept_pages(), 4);
  ASSERT_TRUE(loop.scheduler.Add(MakeRequest(1, 8, 1)).ok());  // the one left, and one of those
  while (loop.Step()) {
  }
  ASSERT_TRUE(loop.scheduler.Add(again).ok());
  ASSERT_TRUE(loop.Step());
  EXPECT_EQ(loop.plan.new_sequences[0].computed_tokens, 8);
}

// A step is planned while the one that samples its input is in flight, and only one.
TEST(SchedulerTest, LooksOneStepAhead) {
  SchedulerOptions options = Small();
  options.lookahead = 1;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 3, 8)).ok());
  const StepPlan first = NextPlan(scheduler), second = NextPlan(scheduler);
  EXPECT_EQ(first.tokens.size(), 3u);
  EXPECT_EQ(second.tokens, std::vector<TokenId>{kSampledBefore});
  EXPECT_TRUE(second.chunks[0].decode);
  EXPECT_TRUE(NextPlan(scheduler).empty());
}

TEST(SchedulerTest, DoesNotLookBeyondTheLastToken) {
  SchedulerOptions options = Small();
  options.lookahead = 1;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 3, 1)).ok());
  EXPECT_FALSE(NextPlan(scheduler).empty());
  EXPECT_TRUE(NextPlan(scheduler).empty());
}

}  // namespace
}  // namespace trireme
