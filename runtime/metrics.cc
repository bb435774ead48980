#include "runtime/metrics.h"

#include <cmath>
#include <variant>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/retrieval_service.h"
#include "runtime/step.h"

namespace trireme {

void Histogram::Observe(double value) {
  int i = 0;
  while (i < kBounds && value > bound(i)) ++i;
  ++buckets_[i];
  ++count_;
  sum_ += value;
}

double Histogram::bound(int i) const { return std::ldexp(first_, i); }

int64_t Histogram::at_most(int i) const {
  int64_t sum = 0;
  for (int k = 0; k <= i; ++k) sum += buckets_[k];
  return sum;
}

double Histogram::Quantile(double q) const {
  for (int i = 0; i < kBounds; ++i) {
    if (count_ > 0 && static_cast<double>(at_most(i)) >= q * static_cast<double>(count_))
      return bound(i);
  }
  return count_ > 0 ? bound(kBounds - 1) : 0.0;
}

void EngineStats::CountStep(const StepPlan& plan, double seconds) {
  int64_t prompt_tokens_here = 0, kv_tokens = 0;
  for (const Chunk& chunk : plan.chunks) {
    if (!chunk.decode) prompt_tokens_here += chunk.num_tokens;
    kv_tokens += chunk.position + chunk.num_tokens;
  }
  ++steps;
  prefill_tokens += prompt_tokens_here;
  if (prompt_tokens_here > 0) {
    prefill_seconds += seconds;
    return;
  }
  decode_seconds += seconds;
  ++decode_steps;
  decode_step_tokens += plan.num_tokens();
  decode_kv_tokens += kv_tokens;
}

namespace {

// A plain member of EngineStats and how it is exposed. By the naming conventions of Prometheus a
// counter's name ends with _total, and a gauge's does not.
struct Metric {
  const char* name;
  const char* help;
  std::variant<int64_t EngineStats::*, double EngineStats::*, Histogram EngineStats::*> member;
};
using S = EngineStats;

constexpr Metric kMetrics[] = {
    {"steps_total", "Steps committed.", &S::steps},
    {"decode_steps_total", "Steps without prompt tokens.", &S::decode_steps},
    {"decode_step_tokens_total", "Tokens of those steps.", &S::decode_step_tokens},
    {"decode_kv_tokens_total", "Positions in the cache that those tokens attended to.",
     &S::decode_kv_tokens},
    {"prefill_tokens_total", "Prompt tokens computed.", &S::prefill_tokens},
    {"decode_tokens_total", "Tokens sampled after the first of a sample.", &S::decode_tokens},
    {"computed_tokens_total", "Tokens of all steps.", &S::computed_tokens},
    {"idle_token_slots_total", "Left empty by steps while somebody waited.", &S::idle_slots},
    {"wasted_tokens_total", "Computed again, or for a sample that was over.", &S::wasted_tokens},
    {"prefill_seconds_total", "Time of steps with prompt tokens.", &S::prefill_seconds},
    {"decode_seconds_total", "Time of steps without prompt tokens.", &S::decode_seconds},
    {"execute_seconds_total", "Time the first rank executed steps.", &S::execute_seconds},
    {"communication_seconds_total", "Time the first rank spent between ranks.",
     &S::communication_seconds},
    {"sample_seconds_total", "Samples waiting and running, integrated over time.",
     &S::sample_seconds},
    {"requests_total", "Requests accepted.", &S::requests},
    {"requests_refused_total", "Requests refused.", &S::refused},
    {"requests_overloaded_total", "Requests refused because the queue was full.", &S::overloaded},
    {"callback_errors_total", "Callbacks that threw.", &S::callback_errors},
    {"preemptions_total", "Samples that gave their pages back.", &S::preemptions},
    {"prompt_tokens_total", "Tokens of admitted samples.", &S::prompt_tokens},
    {"cached_tokens_total", "Of them found computed.", &S::cached_tokens},
    {"page_copies_total", "Pages copied on write.", &S::page_copies},
    {"samples_waiting", "Samples waiting.", &S::waiting},
    {"samples_running", "Samples running.", &S::running},
    {"kv_pages", "Pages of the KV cache.", &S::pages},
    {"kv_pages_free", "Pages that nobody reads, cached ones included.", &S::pages_free},
    {"kv_pages_cached", "Free pages whose content is remembered.", &S::pages_cached},
    {"queue_seconds", "From submission to the first step.", &S::queue_seconds},
    {"first_token_seconds", "From submission to the first token.", &S::first_token_seconds},
    {"inter_token_seconds", "Between tokens of a sample.", &S::inter_token_seconds},
    {"request_seconds", "From submission to the end of a sample.", &S::request_seconds},
    {"step_seconds", "From dispatch to result.", &S::step_seconds},
    {"step_tokens", "Tokens of a step.", &S::step_tokens},
    {"step_sequences", "Sequences of a step.", &S::step_sequences},
};

void AppendHead(std::string* out, const char* name, const char* type, const char* help) {
  absl::StrAppend(out, "# HELP trireme_", name, " ", help, "\n# TYPE trireme_", name, " ", type,
                  "\n");
}

// Enough digits that a counter of seconds still moves with each step after months.
std::string Text(double value) { return absl::StrFormat("%.9g", value); }
std::string Text(int64_t value) { return absl::StrCat(value); }

void Append(std::string* out, const Metric& metric, const Histogram& histogram) {
  const char* name = metric.name;
  AppendHead(out, name, "histogram", metric.help);
  for (int i = 0; i < Histogram::kBounds; ++i) {
    absl::StrAppendFormat(out, "trireme_%s_bucket{le=\"%.6g\"} %d\n", name, histogram.bound(i),
                          histogram.at_most(i));
  }
  absl::StrAppendFormat(out, "trireme_%s_bucket{le=\"+Inf\"} %d\n", name, histogram.count());
  absl::StrAppendFormat(out, "trireme_%s_sum %s\ntrireme_%s_count %d\n", name,
                        Text(histogram.sum()), name, histogram.count());
}

template <typename Number>
void AppendValue(std::string* out, const char* name, const char* help, Number value) {
  AppendHead(out, name, absl::EndsWith(name, "_total") ? "counter" : "gauge", help);
  absl::StrAppend(out, "trireme_", name, " ", Text(value), "\n");
}
template <typename Number>
void Append(std::string* out, const Metric& metric, Number value) {
  AppendValue(out, metric.name, metric.help, value);
}

// counts[i] is of Reason(i).
template <typename Reason, size_t kReasons>
void AppendByReason(std::string* out, const char* name, const char* help,
                    const std::array<int64_t, kReasons>& counts, size_t first = 0) {
  AppendHead(out, name, "counter", help);
  for (size_t i = first; i < kReasons; ++i) {
    absl::StrAppend(out, "trireme_", name, "{reason=\"", Name(static_cast<Reason>(i)), "\"} ",
                    counts[i], "\n");
  }
}

}  // namespace

std::string PrometheusText(const EngineStats& stats) {
  std::string out;
  for (const Metric& metric : kMetrics)
    std::visit([&](auto member) { Append(&out, metric, stats.*member); }, metric.member);
  AppendByReason<FinishReason>(&out, "samples_finished_total", "Samples that ended, by reason.",
                               stats.finished, 1);
  const GraphStats& graphs = stats.graphs;
  AppendValue(&out, "graphs", "Captured decode steps of the first rank.", graphs.graphs);
  AppendValue(&out, "graph_bytes", "Device memory that they hold.", graphs.bytes);
  AppendValue(&out, "graph_steps_total", "Steps of the first rank that were replayed.",
              graphs.replays);
  AppendByReason<EagerReason>(&out, "eager_steps_total",
                              "Steps of the first rank that were enqueued anew, by reason.",
                              graphs.eager);
  AppendByReason<EagerReason>(&out, "graphs_refused_total",
                              "Sizes of decode steps that are not replayed, by reason.",
                              graphs.refused);
  return out;
}

std::string PrometheusText(const RetrievalServiceStats& stats) {
  std::string out;
  AppendValue(&out, "retrieval_requests_total", "Queries answered, failed ones among them.",
              stats.requests);
  AppendValue(&out, "retrieval_failed_total", "Of them those that failed.", stats.failed);
  AppendValue(&out, "retrieval_batches_total", "Batches they were answered in.", stats.batches);
  AppendValue(&out, "retrieval_updates_total", "Upserts and deletes.", stats.updates);
  AppendHead(&out, "retrieval_bytes", "gauge", "Device memory of the first rank, by owner.");
  for (int i = 0; i < kOwners; ++i) {
    absl::StrAppend(&out, "trireme_retrieval_bytes{owner=\"", Name(static_cast<Owner>(i)), "\"} ",
                    stats.held.bytes[i], "\n");
  }
  const GraphStats& graphs = stats.graphs;
  AppendValue(&out, "retrieval_graphs", "Captured searches of the first rank.", graphs.graphs);
  AppendValue(&out, "retrieval_graph_bytes", "Device memory that they hold.", graphs.bytes);
  AppendValue(&out, "retrieval_graph_searches_total",
              "Searches of the first rank that were replayed.", graphs.replays);
  AppendByReason<EagerReason>(&out, "retrieval_eager_searches_total",
                              "Searches of the first rank that were enqueued anew, by reason.",
                              graphs.eager, 1);
  AppendByReason<EagerReason>(&out, "retrieval_graphs_refused_total",
                              "Sizes of searches that are not replayed, by reason.", graphs.refused,
                              1);
  return out;
}

}  // namespace trireme
