// The scheduler on its own: a fake model answers every plan, random requests and cancels run
// against the invariants.

#include "runtime/scheduler.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <set>

namespace trireme {
namespace {

// The token a deterministic "model" gives after `tokens`: depends on all of them, so a lost or
// doubled one shows.
TokenId NextToken(const std::vector<TokenId>& tokens) {
  uint32_t hash = 17;
  for (const TokenId token : tokens) hash = hash * 31 + static_cast<uint32_t>(token) + 1;
  return static_cast<TokenId>(hash % 1000);
}

// What the ranks of a replica would do with the plans: remembers sequences by slot, checks pages
// and positions.
class FakeRanks {
 public:
  explicit FakeRanks(const SchedulerOptions& options)
      : options_(options), slots_(options.max_num_seqs) {}
  StepResult Execute(const StepPlan& plan) {
    EXPECT_LE(plan.tokens(), options_.max_num_batched_tokens);
    EXPECT_LE(static_cast<int64_t>(plan.chunks.size()), options_.max_num_seqs);
    for (const NewSequence& added : plan.new_sequences) slots_[added.slot] = {};
    StepResult result;
    result.step = plan.step;
    std::set<int32_t> seen;
    for (const Chunk& chunk : plan.chunks) {
      EXPECT_TRUE(seen.insert(chunk.slot).second) << "a sequence twice in one micro-batch";
      auto& slot = slots_[chunk.slot];
      EXPECT_EQ(static_cast<size_t>(chunk.position), slot.tokens.size());
      slot.tokens.insert(slot.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
      slot.pages += static_cast<int64_t>(chunk.new_pages.size());
      for (const int32_t page : chunk.new_pages) {
        EXPECT_GE(page, 0);
        EXPECT_LT(page, options_.num_pages);
      }
      EXPECT_EQ(slot.pages, (static_cast<int64_t>(slot.tokens.size()) + options_.page_size - 1) /
                                options_.page_size);
      if (chunk.logit_rows == LogitRows::kLast)
        result.sampled.push_back({NextToken(slot.tokens), 0.0f, {}});
    }
    return result;
  }

 private:
  struct Slot {
    std::vector<TokenId> tokens;
    int64_t pages = 0;
  };
  SchedulerOptions options_;
  std::vector<Slot> slots_;
};

std::vector<TokenId> Alone(const Request& request, int64_t max_model_len) {
  std::vector<TokenId> tokens = request.prompt, out;
  const size_t limit = std::min<size_t>(request.prompt.size() + request.max_tokens, max_model_len);
  while (tokens.size() < limit) {
    tokens.push_back(NextToken(tokens));
    out.push_back(tokens.back());
    if (!request.stop_tokens.empty() && out.back() == request.stop_tokens[0]) break;
  }
  return out;
}

class SchedulerProperty : public ::testing::TestWithParam<int> {};

TEST_P(SchedulerProperty, RandomTrafficGivesEveryRequestItsOwnTokens) {
  std::mt19937 random(GetParam());
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  SchedulerOptions options;
  options.max_num_seqs = draw(1, 9);
  options.max_num_batched_tokens = draw(1, 40);
  options.micro_batches = draw(1, 4);
  options.page_size = draw(1, 8);
  options.max_model_len = draw(8, 64);
  options.num_pages =
      (options.max_model_len + options.page_size - 1) / options.page_size + draw(0, 40);
  Scheduler scheduler(options);
  FakeRanks ranks(options);
  std::map<uint64_t, Request> requests;
  std::map<uint64_t, std::vector<TokenId>> got;
  std::set<uint64_t> open, cancelled;
  struct Step {
    StepPlan plan;
    StepResult result;
  };
  std::deque<Step> in_flight;
  uint64_t next_id = 0;
  for (int event = 0; event < 3000 || !open.empty() || !in_flight.empty(); ++event) {
    const int64_t what = draw(0, 9);
    if (what < 2 && event < 3000) {
      Request request;
      request.id = next_id++;
      const int64_t prompt = draw(1, options.max_model_len - 1);
      for (int64_t i = 0; i < prompt; ++i)
        request.prompt.push_back(static_cast<TokenId>(draw(0, 999)));
      request.max_tokens = draw(1, 30);
      request.stop_tokens = {static_cast<TokenId>(draw(0, 20))};
      ASSERT_TRUE(scheduler.Add(request).ok());
      requests[request.id] = request;
      open.insert(request.id);
    } else if (what == 2 && !open.empty() && draw(0, 3) == 0) {
      const uint64_t id = *std::next(open.begin(), draw(0, static_cast<int64_t>(open.size()) - 1));
      ASSERT_TRUE(scheduler.Cancel(id).ok());
      open.erase(id);
      cancelled.insert(id);
    } else if (what < 7 && static_cast<int64_t>(in_flight.size()) < options.micro_batches) {
      StepPlan plan = scheduler.Next();
      if (plan.empty()) continue;
      StepResult result = ranks.Execute(plan);
      in_flight.push_back({std::move(plan), std::move(result)});
    } else if (!in_flight.empty()) {
      for (const TokenEvent& token :
           scheduler.Commit(in_flight.front().plan, in_flight.front().result)) {
        ASSERT_TRUE(open.count(token.request_id)) << "a token for a request that is over";
        got[token.request_id].push_back(token.sampled.token);
        if (token.finish != FinishReason::kNone) open.erase(token.request_id);
      }
      in_flight.pop_front();
    }
    ASSERT_LT(event, 2'000'000) << "requests starve";
  }
  EXPECT_TRUE(scheduler.idle());
  EXPECT_EQ(scheduler.free_pages(), options.num_pages) << "pages leaked";
  for (const auto& [id, request] : requests) {
    const std::vector<TokenId> expected = Alone(request, options.max_model_len);
    if (!cancelled.count(id)) {
      EXPECT_EQ(got[id], expected);
    } else {
      ASSERT_LE(got[id].size(), expected.size());
      EXPECT_TRUE(std::equal(got[id].begin(), got[id].end(), expected.begin()));
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, SchedulerProperty, ::testing::Range(0, 40));

SchedulerOptions Small() {
  SchedulerOptions options;
  options.num_pages = 4;
  options.page_size = 4;
  options.max_model_len = 16;
  return options;
}

Request MakeRequest(uint64_t id, int64_t prompt, int64_t max_tokens) {
  Request request;
  request.id = id;
  request.prompt.assign(prompt, 1);
  request.max_tokens = max_tokens;
  return request;
}

TEST(SchedulerTest, RefusesWhatCanNeverRunAndNamesTheLimit) {
  Scheduler scheduler(Small());
  EXPECT_NE(scheduler.Add(MakeRequest(1, 0, 1)).message().find("prompt is empty"),
            std::string::npos);
  EXPECT_NE(scheduler.Add(MakeRequest(1, 16, 1)).message().find("--max-model-len 16"),
            std::string::npos);
  EXPECT_NE(scheduler.Add(MakeRequest(1, 1, 0)).message().find("max-tokens"), std::string::npos);
  SchedulerOptions tight = Small();
  tight.num_pages = 2;
  Scheduler few(tight);
  EXPECT_NE(few.Add(MakeRequest(1, 8, 8)).message().find("--kv-cache-memory"), std::string::npos);
  EXPECT_TRUE(scheduler.Add(MakeRequest(1, 1, 1)).ok());
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 1, 1)).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(scheduler.Cancel(7).code(), absl::StatusCode::kNotFound);
}

TEST(SchedulerTest, DealsRunningSequencesOverTheStages) {
  SchedulerOptions options = Small();
  options.num_pages = 64;
  options.micro_batches = 2;
  Scheduler scheduler(options);
  for (uint64_t i = 0; i < 8; ++i) ASSERT_TRUE(scheduler.Add(MakeRequest(i, 2, 4)).ok());
  EXPECT_EQ(scheduler.Next().chunks.size(), 4u);
  EXPECT_EQ(scheduler.Next().chunks.size(), 4u);
  EXPECT_TRUE(scheduler.Next().empty());
}

TEST(SchedulerTest, PrefillChunksOfOnePromptFollowEachOtherThroughThePipeline) {
  SchedulerOptions options = Small();
  options.micro_batches = 2;
  options.max_num_batched_tokens = 5;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(0, 10, 2)).ok());
  const StepPlan first = scheduler.Next(), second = scheduler.Next();
  EXPECT_EQ(first.chunks[0].logit_rows, LogitRows::kNone);
  EXPECT_EQ(second.chunks[0].position, 5);
  EXPECT_EQ(second.chunks[0].logit_rows, LogitRows::kLast);
  EXPECT_TRUE(scheduler.Next().empty());
}

TEST(StepTest, PlansAndResultsSurviveTheWire) {
  StepPlan plan;
  plan.step = 7;
  plan.new_sequences.push_back({.slot = 3, .prompt_tokens = 5, .sampling = {.temperature = 0.5f}});
  Chunk chunk;
  chunk.slot = 3;
  chunk.position = 9;
  chunk.logit_rows = LogitRows::kLast;
  chunk.decode = true;
  chunk.tokens = {1, 2, 3};
  chunk.new_pages = {8};
  plan.chunks = {chunk, Chunk()};
  const StepPlan back = ParseStepPlan(Serialize(plan));
  EXPECT_EQ(Serialize(back), Serialize(plan));
  EXPECT_EQ(back.chunks[0].tokens, chunk.tokens);
  EXPECT_EQ(back.new_sequences[0].sampling.temperature, 0.5f);
  StepResult result;
  result.step = 7;
  result.sampled.push_back({4, -0.5f, {{4, -0.5f}, {9, -1.0f}}});
  result.logits = {1.0f, 2.0f};
  const StepResult result_back = ParseStepResult(Serialize(result));
  EXPECT_EQ(result_back.sampled[0].top, result.sampled[0].top);
  EXPECT_EQ(result_back.logits, result.logits);
}

}  // namespace
}  // namespace trireme
