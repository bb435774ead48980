// What an engine counts, as plain data and as Prometheus text (exposition format 0.0.4). Plain
// data: copied to whoever asks, from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "runtime/graph_stats.h"
#include "runtime/request.h"

namespace trireme {

struct RetrievalServiceStats;
struct StepPlan;

// Counts of values up to each bound; bounds are powers of two, `first` and then its doublings.
class Histogram {
 public:
  static constexpr int kBounds = 24;
  explicit Histogram(double first = 1e-4) : first_(first) {}
  void Observe(double value);
  int64_t count() const { return count_; }
  double sum() const { return sum_; }
  double bound(int i) const;     // i in [0, kBounds)
  int64_t at_most(int i) const;  // values <= bound(i)
  // An upper bound of the q-quantile: the bound of the bucket it is in; 0 without values.
  double Quantile(double q) const;

 private:
  double first_;
  double sum_ = 0.0;
  int64_t count_ = 0;
  std::array<int64_t, kBounds + 1> buckets_{};  // the last: above all bounds
};

struct EngineStats {
  // Counters.
  int64_t steps = 0;
  int64_t decode_steps = 0;            // of them without prompt tokens,
  int64_t decode_step_tokens = 0;      // the tokens these computed, one a sequence,
  int64_t decode_kv_tokens = 0;        // and the positions whose keys and values those attended to
  int64_t prefill_tokens = 0;          // computed for prompts, those computed again included
  int64_t decode_tokens = 0;           // sampled after the first of a sample
  int64_t computed_tokens = 0;         // planned, and
  int64_t idle_slots = 0;              // left empty while somebody waited: SchedulerStats
  int64_t wasted_tokens = 0;           // of those computed
  double prefill_seconds = 0.0;        // time in which the oldest step in flight held prompt tokens
  double decode_seconds = 0.0;         // time in which it did not
  double execute_seconds = 0.0;        // the leader's own part of the steps
  double communication_seconds = 0.0;  // of it between ranks, and waiting for results
  // Samples waiting and running, integrated over time as the scheduler counts them: over a time, it
  // is how many there are in the mean (Little's law).
  double sample_seconds = 0.0;
  int64_t requests = 0;                            // accepted
  int64_t refused = 0;                             // at Submit, for any reason
  int64_t overloaded = 0;                          // of them because of a full queue
  std::array<int64_t, kFinishReasons> finished{};  // samples, by FinishReason
  int64_t callback_errors = 0;
  int64_t preemptions = 0;
  int64_t prompt_tokens = 0;  // of admitted samples,
  int64_t cached_tokens = 0;  // and how many of them were found computed
  int64_t page_copies = 0;
  GraphStats graphs;  // of the leader's steps; how many there are and their bytes are gauges
  // Gauges.
  int64_t waiting = 0, running = 0;                     // samples
  int64_t pages = 0, pages_free = 0, pages_cached = 0;  // free ones hold nothing that is read; of
                                                        // them some are cached
  // Histograms.
  Histogram queue_seconds;        // from Submit to the first plan
  Histogram first_token_seconds;  // from Submit
  Histogram inter_token_seconds;
  Histogram request_seconds;
  Histogram step_seconds;
  Histogram step_tokens{1.0};
  Histogram step_sequences{1.0};

  // A committed step that took so long.
  void CountStep(const StepPlan& plan, double seconds);

  // Of the token slots the steps had to give, the share that did useful work.
  double slot_utilisation() const {
    const int64_t slots = computed_tokens + idle_slots;
    return slots > 0 ? static_cast<double>(computed_tokens - wasted_tokens) / slots : 0.0;
  }
  double cache_hit_rate() const {
    return prompt_tokens > 0 ? static_cast<double>(cached_tokens) / prompt_tokens : 0.0;
  }
};

// Where one request's time went, microseconds. Queue, prefill and decode add up to the total;
// communication and overhead are parts of the latter two.
struct RequestTimes {
  int64_t queue_us = 0;          // until the first plan
  int64_t prefill_us = 0;        // from there to the first token
  int64_t decode_us = 0;         // and to the end
  int64_t communication_us = 0;  // between ranks, and waiting for their results
  int64_t overhead_us = 0;       // while no step was being executed here
  int64_t total_us() const { return queue_us + prefill_us + decode_us; }
};

struct RequestTimeline : RequestTimes {
  uint64_t request_id = 0;
  FinishReason finish = FinishReason::kNone;  // of its last sample; kNone: not over yet
  absl::Status status;                        // with kError: why
  int64_t prompt_tokens = 0, output_tokens = 0;
  int64_t arrival_us = 0;  // on Engine::NowMicros's clock
};

std::string PrometheusText(const EngineStats& stats);
// Names of their own, so that one job's two texts may follow each other.
std::string PrometheusText(const RetrievalServiceStats& stats);

}  // namespace trireme
