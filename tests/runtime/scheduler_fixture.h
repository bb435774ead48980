// What the scheduler's tests share: a small scheduler, requests for it, and a loop of single steps.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "runtime/scheduler.h"
#include "tests/runtime/fake_ranks.h"

namespace trireme {

inline SchedulerOptions Small() {
  SchedulerOptions options;
  options.num_pages = 4;
  options.page_size = 4;
  options.max_model_len = 16;
  return options;
}

inline Request MakeRequest(uint64_t id, int64_t prompt, int64_t max_tokens, int32_t priority = 0) {
  Request request;
  request.id = id;
  for (int64_t i = 0; i < prompt; ++i)
    request.prompt.push_back(static_cast<TokenId>(100 * id + static_cast<uint64_t>(i)));
  request.max_tokens = max_tokens;
  request.priority = priority;
  return request;
}

// A scheduler and its ranks, one step at a time.
class Loop {
 public:
  explicit Loop(const SchedulerOptions& options) : scheduler(options), ranks(options) {}
  // One step from plan to commit; false when there was nothing to plan.
  bool Step() {
    if (!scheduler.Next(&plan)) return false;
    StepResult result;
    ranks.Execute(plan, &result);
    ranks.Commit(plan);
    events.clear();
    scheduler.Commit(plan, result, &events);
    EXPECT_EQ(ranks.error(), "");
    for (const TokenEvent& event : events) {
      if (event.finish != FinishReason::kNone) ended.push_back(event.request_id);
    }
    return true;
  }
  Scheduler scheduler;
  FakeRanks ranks;
  StepPlan plan;
  std::vector<TokenEvent> events;
  std::vector<uint64_t> ended;
};

inline StepPlan NextPlan(Scheduler& scheduler) {
  StepPlan plan;
  scheduler.Next(&plan);
  return plan;
}

}  // namespace trireme
