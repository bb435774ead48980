// The scheduler under random traffic, against its invariants: every request gets exactly the tokens
// it would get alone, whatever is preempted, shared, forked or cancelled around it; the budget is
// kept; no page leaks; nobody starves; the same events give the same plans.

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <set>

#include "tests/runtime/fake_ranks.h"

namespace trireme {
namespace {

constexpr int kSeeds = 60;
constexpr int kEventsPerSeed = 40'000;  // 2.4 million in all

class Traffic {
 public:
  explicit Traffic(int seed) : random_(seed), options_(DrawOptions(seed)), ranks_(options_) {
    scheduler_ = std::make_unique<Scheduler>(options_);
    twin_ = std::make_unique<Scheduler>(options_);
    // Prompts that begin alike, so that pages can be shared.
    for (auto& prefix : prefixes_) {
      prefix.resize(options_.max_model_len);
      for (TokenId& token : prefix) token = static_cast<TokenId>(Below(1000));
    }
  }

  void Run(int events) {
    for (int event = 0; event < events || !open_.empty() || !in_flight_.empty(); ++event) {
      Event(event < events);
      ASSERT_EQ(ranks_.error(), "") << "event " << event;
      ASSERT_LT(event, 50 * events) << "requests starve";
      if (::testing::Test::HasFatalFailure()) return;
    }
    CheckEnd();
  }
  const SchedulerStats& stats() const { return scheduler_->stats(); }

 private:
  struct Sample {
    std::vector<TokenId> tokens;
    FinishReason finish = FinishReason::kNone;
  };
  struct Open {
    Request request;
    std::vector<Sample> samples;
    int32_t left = 0;
    // Of one that has not started yet; see CheckWaits.
    bool started = false;
    int64_t arrival = 0, virtual_arrival = 0;  // in steps
    int64_t tokens_ahead = 0, preemptions_before = 0;
  };
  struct Step {
    StepPlan plan, twin;
    StepResult result;
  };

  int64_t Below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }

  SchedulerOptions DrawOptions(int seed) {
    SchedulerOptions o;
    o.max_num_seqs = Between(1, 9);
    o.max_num_batched_tokens = Between(1, 40);
    o.micro_batches = Between(1, 4);
    o.lookahead = o.micro_batches == 1 ? Below(2) : 0;
    o.page_size = Between(1, 8);
    o.max_model_len = Between(8, 64);
    o.prefix_cache = Below(4) > 0;
    o.sliding_window = Below(3) == 0 ? Between(1, 24) : 0;
    o.ageing_steps = Between(1, 50);
    o.policy = seed % 10 == 8   ? BatchPolicy::kStatic
               : seed % 10 == 9 ? BatchPolicy::kDynamic
                                : BatchPolicy::kContinuous;
    o.batch_window_us = 50;
    const auto pages_for = [&o](int64_t tokens) {
      return (tokens + o.page_size - 1) / o.page_size;
    };
    // What one request may need, as Check has it: behind a window pages are given back.
    int64_t least = pages_for(o.max_model_len);
    if (o.sliding_window > 0) least = std::min(least, pages_for(o.sliding_window) + 2);
    o.num_pages = least + Below(Below(2) == 0 ? 4 : 40);  // half of them are always short of pages
    most_open_ = Below(2) == 0 ? Between(1, 3) : 40;
    return o;
  }

  void Event(bool arrivals) {
    const int64_t what = Below(16);
    if (what < 3 && arrivals && static_cast<int64_t>(open_.size()) < most_open_) return Add();
    if (what == 3 && Below(4) == 0) return Cancel();
    if (what == 4) return Tell(++now_);
    if (!arrivals && what == 5) {
      scheduler_->Drain();
      twin_->Drain();
    }
    const int64_t depth = options_.lookahead + options_.micro_batches;
    if (what < 11 && static_cast<int64_t>(in_flight_.size()) < depth) return Plan();
    if (!in_flight_.empty()) Commit();
  }

  void Add() {
    Request request;
    request.id = next_id_++;
    const int64_t prompt = Between(1, options_.max_model_len - 1);
    const std::vector<TokenId>& prefix = prefixes_[Below(3)];
    const int64_t shared = Below(2) == 0 ? 0 : Below(prompt + 1);
    request.prompt.assign(prefix.begin(), prefix.begin() + shared);
    // As in a conversation: the last prompt, and more.
    if (Below(4) == 0 && static_cast<int64_t>(last_prompt_.size()) <= prompt)
      request.prompt = last_prompt_;
    while (static_cast<int64_t>(request.prompt.size()) < prompt)
      request.prompt.push_back(static_cast<TokenId>(Below(1000)));
    last_prompt_ = request.prompt;
    request.max_tokens = Below(4) == 0 ? 1 : Between(1, 30);
    request.stop_tokens = {static_cast<TokenId>(Below(20))};
    request.sampling.seed = static_cast<uint64_t>(Below(5));
    request.n = Below(4) == 0 ? static_cast<int32_t>(Between(2, 4)) : 1;
    request.priority = static_cast<int32_t>(Below(4) == 0 ? Between(-3, 3) : 0);
    request.arrival_us = now_;
    if (Below(10) == 0) request.deadline_us = now_ + Between(1, 2000);
    ASSERT_TRUE(scheduler_->Add(request).ok());
    ASSERT_TRUE(twin_->Add(request).ok());
    Open open{request, std::vector<Sample>(request.n), request.n};
    open.arrival = steps_;
    open.virtual_arrival = steps_ - request.priority * options_.ageing_steps;
    open.preemptions_before = stats().preemptions;
    open.tokens_ahead = options_.max_num_seqs * options_.max_model_len;
    for (auto& [id, other] : open_) {
      // Of two that are level the one that came first goes first.
      Open& behind = open.virtual_arrival < other.virtual_arrival ? other : open;
      const Open& ahead = &behind == &open ? other : open;
      behind.tokens_ahead += ahead.left * MostTokens(ahead.request);
    }
    open_.emplace(request.id, std::move(open));
  }

  int64_t MostTokens(const Request& request) const {
    const int64_t prompt = static_cast<int64_t>(request.prompt.size());
    return std::min(prompt + request.max_tokens, options_.max_model_len);
  }

  // Nobody starves: the steps from a request's arrival to its start are bounded. Let v be the step
  // of its arrival minus priority x ageing_steps. Ahead of it are the open samples with an earlier
  // v (or the same, and here before) and, of those that come later, the ones with an earlier v:
  // with the highest priority p' they come within (p' - p) x ageing_steps steps, and after that
  // nobody gets ahead any more. While it waits, nobody behind it starts or starts again, since
  // Scheduler::AddWaiting goes in that order and stops at the first without room. So every step
  // computes a token, at least, of
  //   one that was running when it came: max_num_seqs of max_model_len tokens, at most; or
  //   one ahead of it, which has its prompt and max_tokens to compute;
  // and a token is computed again only after a preemption, which loses max_model_len at most. The
  // first of all is never preempted and has room when those that run have ended, so there is always
  // a step. With kStatic and kDynamic a request also waits for company.
  void CheckWaits() {
    for (const uint64_t id : scheduler_->admitted()) open_.at(id).started = true;
    if (options_.policy != BatchPolicy::kContinuous) return;
    for (const auto& [id, open] : open_) {
      if (open.started) continue;
      const int64_t preemptions = stats().preemptions - open.preemptions_before;
      const int64_t bound = open.tokens_ahead + preemptions * options_.max_model_len;
      ASSERT_LE(steps_ - open.arrival, bound) << "request " << id << " starves";
    }
  }

  void Cancel() {
    if (open_.empty()) return;
    auto it = std::next(open_.begin(), Below(static_cast<int64_t>(open_.size())));
    const uint64_t id = it->first;
    Open& open = it->second;
    if (Below(2) == 0) {
      ASSERT_TRUE(scheduler_->Cancel(id).ok());
      ASSERT_TRUE(twin_->Cancel(id).ok());
      for (int32_t i = 0; i < open.request.n; ++i) {
        if (open.samples[i].finish == FinishReason::kNone) Ended(id, i, FinishReason::kCancelled);
        if (!open_.count(id)) return;
      }
      return;
    }
    const int32_t sample = static_cast<int32_t>(Below(open.request.n));
    const bool running = open.samples[sample].finish == FinishReason::kNone;
    ASSERT_EQ(scheduler_->Cancel(id, sample).ok(), running);
    ASSERT_EQ(twin_->Cancel(id, sample).ok(), running);
    if (running) Ended(id, sample, FinishReason::kCancelled);
  }

  void Tell(int64_t now) {
    std::vector<TokenEvent> events, twin_events;
    scheduler_->AdvanceTime(now, &events);
    twin_->AdvanceTime(now, &twin_events);
    ASSERT_EQ(events.size(), twin_events.size());
    for (const TokenEvent& event : events) Take(event);
  }

  void Plan() {
    Step step;
    const bool planned = scheduler_->Next(&step.plan);
    ASSERT_EQ(planned, !step.plan.empty());
    twin_->Next(&step.twin);
    std::string plan, twin;
    Serialize(step.plan, &plan);
    Serialize(step.twin, &twin);
    ASSERT_EQ(plan, twin) << "the same events, another plan";
    if (step.plan.empty()) {
      // Only something in flight, or company that may still come, can be waited for.
      ASSERT_TRUE(!in_flight_.empty() || scheduler_->idle() ||
                  options_.policy != BatchPolicy::kContinuous)
          << "nothing is planned and nothing is in flight";
      return;
    }
    ++steps_;
    CheckWaits();
    ranks_.Execute(step.plan, &step.result);
    in_flight_.push_back(std::move(step));
  }

  void Commit() {
    const Step& step = in_flight_.front();
    std::vector<TokenEvent> events, twin_events;
    scheduler_->Commit(step.plan, step.result, &events);
    twin_->Commit(step.twin, step.result, &twin_events);
    ranks_.Commit(step.plan);
    in_flight_.pop_front();
    ASSERT_EQ(events.size(), twin_events.size());
    for (const TokenEvent& event : events) Take(event);
  }

  void Take(const TokenEvent& event) {
    const auto it = open_.find(event.request_id);
    ASSERT_TRUE(it != open_.end()) << "a token for a request that is over";
    Sample& sample = it->second.samples[event.sample];
    ASSERT_EQ(sample.finish, FinishReason::kNone) << "a token for a sample that is over";
    if (event.sampled.token >= 0) sample.tokens.push_back(event.sampled.token);
    if (event.finish != FinishReason::kNone) Ended(event.request_id, event.sample, event.finish);
  }

  void Ended(uint64_t id, int32_t index, FinishReason finish) {
    Open& open = open_.at(id);
    open.samples[index].finish = finish;
    const std::vector<TokenId> expected = FakeRanks::Alone(open.request, index, options_);
    std::vector<TokenId> got = open.samples[index].tokens;
    if (finish == FinishReason::kStop || finish == FinishReason::kLength) {
      ASSERT_EQ(got, expected);
    } else {  // cut off: what came is right as far as it goes
      ASSERT_LE(got.size(), expected.size());
      ASSERT_TRUE(std::equal(got.begin(), got.end(), expected.begin()));
    }
    if (--open.left == 0) open_.erase(id);
  }

  void CheckEnd() {
    EXPECT_TRUE(scheduler_->idle());
    EXPECT_EQ(scheduler_->free_pages(), options_.num_pages) << "pages leaked";
    StepPlan plan;
    EXPECT_FALSE(scheduler_->Next(&plan));
  }

  std::mt19937_64 random_;
  int64_t most_open_ = 0;  // half of the seeds have a queue, the others are often idle
  SchedulerOptions options_;
  FakeRanks ranks_;
  std::unique_ptr<Scheduler> scheduler_, twin_;
  std::vector<TokenId> prefixes_[3], last_prompt_;
  std::map<uint64_t, Open> open_;
  std::deque<Step> in_flight_;
  uint64_t next_id_ = 0;
  int64_t now_ = 1;
  int64_t steps_ = 0;  // planned
};

TEST(SchedulerPropertyTest, RandomTrafficGivesEveryRequestItsOwnTokens) {
  SchedulerStats sum;
  for (int seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Traffic traffic(seed);
    traffic.Run(kEventsPerSeed);
    if (HasFatalFailure()) return;
    sum.preemptions += traffic.stats().preemptions;
    sum.cached_tokens += traffic.stats().cached_tokens;
    sum.page_copies += traffic.stats().page_copies;
  }
  // The traffic met what it is there to meet.
  EXPECT_GT(sum.preemptions, 1000);
  EXPECT_GT(sum.cached_tokens, 10'000);
  EXPECT_GT(sum.page_copies, 1000);
}

}  // namespace
}  // namespace trireme
