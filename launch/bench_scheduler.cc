// trireme bench scheduler: what planning and committing a step costs, without a model. The ranks
// are a loop that answers every plan at once; the time is that of Next and Commit alone.

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels/philox.h"
#include "launch/session.h"
#include "nlohmann/json.hpp"
#include "runtime/scheduler.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

Request MakeRequest(uint64_t id) {
  Request request;
  request.id = id;
  const uint32_t bits = Philox4x32({{static_cast<uint32_t>(id), 0, 0, 0}}, 7, 0).x[0];
  request.prompt.assign(16 + bits % 240, static_cast<TokenId>(id % 1000));
  // Ends spread out, so that admissions and ends are part of what is measured.
  request.max_tokens = 256 + bits / 256 % 768;
  request.stop_tokens = {-2};
  return request;
}

nlohmann::ordered_json Measure(const BenchSchedulerFlags& flags) {
  SchedulerOptions options;
  options.max_num_seqs = flags.running;
  options.max_num_batched_tokens = flags.running + 512;
  options.max_model_len = 2048;
  options.num_pages = flags.running * options.max_model_len / options.page_size;
  options.lookahead = 1;
  Scheduler scheduler(options);
  uint64_t next_id = 0;
  StepPlan plan;
  StepResult result;
  std::vector<TokenEvent> events;
  std::vector<double> next, commit;
  int64_t step = 0, chunks = 0;
  while (static_cast<int64_t>(next.size()) < flags.steps) {
    while (scheduler.running() + scheduler.waiting() < flags.running)
      if (!scheduler.Add(MakeRequest(next_id++)).ok()) return {};
    const Clock::time_point begin = Clock::now();
    scheduler.Next(&plan);
    const Clock::time_point planned = Clock::now();
    result.step = plan.step;
    result.sampled.clear();
    for (const Chunk& chunk : plan.chunks) {
      if (chunk.logit_rows == LogitRows::kLast)
        result.sampled.push_back({static_cast<TokenId>(step % 1000), 0.0f, {}});
    }
    const Clock::time_point executed = Clock::now();
    events.clear();
    scheduler.Commit(plan, result, &events);
    const Clock::time_point committed = Clock::now();
    ++step;
    if (scheduler.running() < flags.running) continue;  // still filling up
    next.push_back(Microseconds(planned - begin));
    commit.push_back(Microseconds(committed - executed));
    chunks += static_cast<int64_t>(plan.chunks.size());
  }
  const auto quantile = [](std::vector<double> samples, double q) {
    std::sort(samples.begin(), samples.end());
    return samples[static_cast<size_t>(q * static_cast<double>(samples.size() - 1))];
  };
  std::vector<double> both;
  for (size_t i = 0; i < next.size(); ++i) both.push_back(next[i] + commit[i]);
  return {{"bench", "scheduler"},
          {"running", flags.running},
          {"steps", flags.steps},
          {"sequences_per_step", static_cast<double>(chunks) / static_cast<double>(next.size())},
          {"next_us", {{"p50", quantile(next, 0.5)}, {"p99", quantile(next, 0.99)}}},
          {"commit_us", {{"p50", quantile(commit, 0.5)}, {"p99", quantile(commit, 0.99)}}},
          {"both_us", {{"p50", quantile(both, 0.5)}, {"p99", quantile(both, 0.99)}}}};
}

}  // namespace

absl::Status RunBenchScheduler(ControlPlane& control, const BenchSchedulerFlags& flags) {
  absl::Status status;
  if (control.rank() == 0) status = WriteOut(control, Measure(flags).dump(2) + "\n");
  return control.Agree(status);
}

}  // namespace trireme
