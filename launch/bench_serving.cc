// trireme bench serving: requests of mixed lengths, all at once or as a Poisson process would bring
// them, or a recording of arrivals, in process. Latencies as their callers see them, goodput under
// an SLO, how full the steps are, and Little's law as a check on the bookkeeping. Each policy and
// each rate is one run on the same requests.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/philox.h"
#include "kernels/status.h"
#include "launch/arrivals.h"
#include "launch/output_files.h"
#include "launch/serving_report.h"
#include "launch/session.h"
#include "launch/trace_file.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// Uniform in (0, 1), by what it is for and for whom.
double Uniform(uint64_t seed, uint32_t purpose, uint32_t i) {
  const uint32_t bits = Philox4x32({{i, purpose, 0, 0}}, static_cast<uint32_t>(seed), 11).x[0];
  return (bits + 0.5) * 0x1p-32;
}

struct Arrival {
  Request request;
  double at = 0.0;  // seconds since the run began
};

Json Quantiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  Json out;
  for (const auto& [name, q] : {std::pair("p50", 0.5), {"p95", 0.95}, {"p99", 0.99}}) {
    const double at = std::ceil(q * static_cast<double>(samples.size()));
    out[name] = samples.empty() ? 0.0 : samples[static_cast<size_t>(std::max(1.0, at)) - 1];
  }
  return out;
}

class BenchServing {
 public:
  BenchServing(ControlPlane& control, const BenchServingFlags& flags)
      : control_(control), flags_(flags) {}

  absl::Status Execute() {
    ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control_, flags_.model));
    if (topology.dp_size > 1) return UsageError("bench: replicas do not share work; use --dp 1");
    if (flags_.min_len > flags_.max_len) return UsageError("--min-len is larger than --max-len");
    for (const std::string& policy : flags_.policies) RETURN_IF_ERROR(ParsePolicy(policy).status());
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? CheckOutputs() : absl::OkStatus()));
    RETURN_IF_ERROR(control_.Agree(ReadRecorded()));
    ASSIGN_OR_RETURN(worker_, LoadWorker(control_, topology, flags_.model,
                                         {.max_sequence_tokens = LongestSequence()}));
    BeginTraceFile(flags_.serving.trace_file);
    const std::vector<double> all_at_once{0.0};  // or as recorded
    for (const double rate : flags_.request_rates.empty() ? all_at_once : flags_.request_rates) {
      for (const std::string& policy : flags_.policies) RETURN_IF_ERROR(Run(policy, rate));
    }
    RETURN_IF_ERROR(EndTraceFile(control_, flags_.serving.trace_file));
    return control_.Agree(control_.rank() == 0 ? WriteOut(control_, results_.dump(2) + "\n")
                                               : absl::OkStatus());
  }

 private:
  absl::Status CheckOutputs() const {
    return CheckOutputFiles(
        {{"--metrics", flags_.serving.metrics_file}, {"--trace", flags_.serving.trace_file}},
        {{"--arrivals", flags_.arrivals_file}}, flags_.model.model_dir);
  }

  absl::Status ReadRecorded() {
    if (control_.rank() != 0 || flags_.arrivals_file.empty()) return absl::OkStatus();
    const FlightRecorder::Outside outside(control_.recorder());  // the file may be a pipe
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags_.model.model_dir));
    const int64_t limit = flags_.model.max_model_len;
    ASSIGN_OR_RETURN(recorded_,
                     ReadArrivals(flags_.arrivals_file, limit > 0 ? limit : config.max_positions));
    return absl::OkStatus();
  }

  // Collective: rank 0 alone knows the recording.
  int64_t LongestSequence() {
    if (flags_.arrivals_file.empty()) return flags_.shared_prefix + 2 * flags_.max_len;
    int64_t longest = 0;
    for (const RecordedArrival& arrival : recorded_)
      longest = std::max(longest, arrival.prompt_tokens + arrival.max_tokens);
    ByteWriter out;
    out.Put(longest);
    std::string bytes = out.Take();
    control_.Broadcast(&bytes);
    return ByteReader(bytes).Get<int64_t>();
  }

  int64_t DrawLength(uint32_t purpose, uint32_t i) const {
    const double low = std::log(flags_.min_len), high = std::log(flags_.max_len + 1.0);
    const double length = std::exp(low + (high - low) * Uniform(flags_.seed, purpose, i));
    return std::clamp(static_cast<int64_t>(length), flags_.min_len, flags_.max_len);
  }

  // Random tokens. The first of them are everybody's where a beginning is shared.
  std::vector<TokenId> DrawPrompt(int64_t tokens, uint32_t i) const {
    const int64_t vocabulary = worker_->config().vocab_size;
    std::vector<TokenId> out;
    for (int64_t t = 0; t < tokens; ++t) {
      const uint32_t who = t < flags_.shared_prefix ? ~0u : i;
      const auto token = static_cast<uint64_t>(Uniform(flags_.seed + who, 2, t) * vocabulary);
      out.push_back(static_cast<TokenId>(token));
    }
    return out;
  }

  std::vector<Arrival> Recorded() const {
    std::vector<Arrival> out;
    for (const RecordedArrival& recorded : recorded_) {
      const auto i = static_cast<uint32_t>(out.size());
      Arrival& arrival = out.emplace_back();
      arrival.request.id = i;
      arrival.request.prompt = DrawPrompt(recorded.prompt_tokens, i);
      arrival.request.max_tokens = recorded.max_tokens;
      arrival.at = recorded.at;
    }
    return out;
  }

  std::vector<Arrival> Drawn(double rate) const {
    const int64_t limit = worker_->options().max_model_len;
    std::vector<Arrival> out;
    double at = 0.0;
    for (uint32_t i = 0; i < flags_.num_prompts; ++i) {
      Arrival& arrival = out.emplace_back();
      arrival.request.id = i;
      arrival.request.prompt =
          DrawPrompt(std::min(limit - 1, flags_.shared_prefix + DrawLength(1, i)), i);
      arrival.request.max_tokens = DrawLength(3, i);
      if (rate > 0.0) at -= std::log(Uniform(flags_.seed, 4, i)) / rate;
      arrival.at = at;
    }
    return out;
  }

  absl::Status Run(const std::string& policy, double rate) {
    absl::Status status;
    if (control_.rank() == worker_->leader()) {
      status = Lead(policy, rate);
    } else {
      status = worker_->Run();
    }
    return control_.Agree(status);
  }

  absl::Status Lead(const std::string& policy, double rate) {
    ServingFlags serving = flags_.serving;
    serving.policy = policy;
    ASSIGN_OR_RETURN(const EngineOptions options, EngineOptionsOf(serving));
    std::vector<Arrival> arrivals = flags_.arrivals_file.empty() ? Drawn(rate) : Recorded();
    served_.assign(arrivals.size(), {});
    ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                     Engine::Create(*worker_, nullptr, options));
    const Clock::time_point begin = Clock::now();
    int64_t refused = 0;
    for (Arrival& arrival : arrivals) {
      std::this_thread::sleep_until(begin + std::chrono::duration_cast<Clock::duration>(
                                                std::chrono::duration<double>(arrival.at)));
      const uint64_t id = arrival.request.id;
      served_[id].submitted = Seconds(Clock::now() - begin);
      const absl::Status submitted =
          engine->Submit(std::move(arrival.request), [this, begin](const TokenOutput& output) {
            if (output.sampled.token < 0) return;
            // Read after the drain only.
            served_[output.request_id].tokens.push_back(Seconds(Clock::now() - begin));
          });
      if (absl::IsResourceExhausted(submitted)) {
        ++refused;
      } else {
        RETURN_IF_ERROR(submitted);
      }
    }
    RETURN_IF_ERROR(engine->Drain());
    const double total = Seconds(Clock::now() - begin);
    const ServingLatencies latencies =
        Measure(served_, flags_.slo_first_token_ms, flags_.slo_time_per_output_token_ms);
    Json result = Result(policy, rate, total, latencies, engine->Stats());
    result["refused"] = refused;
    // All requests lie within the run, so that the law holds of it exactly; what may differ is who
    // counts: the scheduler who is there, their callers how long they stay.
    const LittlesLaw law{.in_system = engine->Stats().sample_seconds / total,
                         .rate_times_stay = latencies.stay_seconds / total};
    if (!law.holds()) std::fprintf(stderr, "trireme: warning: %s\n", law.Describe().c_str());
    result["littles_law"] = {{"in_system", law.in_system},
                             {"rate_times_stay", law.rate_times_stay},
                             {"difference", law.difference()},
                             {"holds", law.holds()}};
    std::fprintf(stderr, "%-10s %8.2f req/s  %10.1f tok/s  first token p99 %.1f ms\n",
                 policy.c_str(), rate, result["output_tokens_per_s"].get<double>(),
                 result["first_token_ms"]["p99"].get<double>());
    results_.push_back(std::move(result));
    return WriteMetrics(serving, engine->Stats());
  }

  Json Result(const std::string& policy, double rate, double total,
              const ServingLatencies& latencies, const EngineStats& stats) {
    const auto per = [](double amount, double base) { return base > 0.0 ? amount / base : 0.0; };
    return {
        {"bench", "serving"},
        {"policy", policy},
        {"arrivals", !flags_.arrivals_file.empty() ? flags_.arrivals_file
                     : rate > 0.0                  ? "poisson"
                                                   : "all at once"},
        {"request_rate", rate},
        {"requests", latencies.requests},
        {"seconds", total},
        {"requests_per_s", per(static_cast<double>(latencies.requests), total)},
        {"output_tokens_per_s", per(static_cast<double>(latencies.tokens), total)},
        {"first_token_ms", Quantiles(latencies.first_token)},
        {"inter_token_ms", Quantiles(latencies.inter_token)},
        {"time_per_output_token_ms", Quantiles(latencies.time_per_output_token)},
        {"goodput_requests_per_s", per(static_cast<double>(latencies.good), total)},
        {"slo",
         {{"first_token_ms", flags_.slo_first_token_ms},
          {"time_per_output_token_ms", flags_.slo_time_per_output_token_ms}}},
        {"steps", stats.steps},
        {"prefill_tokens", stats.prefill_tokens},
        {"cache_hit_rate", stats.cache_hit_rate()},
        {"preemptions", stats.preemptions},
        {"token_slot_utilisation", stats.slot_utilisation()},
        {"computed_tokens", stats.computed_tokens},
        {"idle_slots", stats.idle_slots},
        {"wasted_tokens", stats.wasted_tokens},
        {"sequences_per_step", per(stats.step_sequences.sum(), static_cast<double>(stats.steps))},
        {"tokens_per_step", per(stats.step_tokens.sum(), static_cast<double>(stats.steps))}};
  }

  ControlPlane& control_;
  const BenchServingFlags& flags_;
  std::unique_ptr<Worker> worker_;
  std::vector<ServedRequest> served_;      // by request
  std::vector<RecordedArrival> recorded_;  // rank 0
  Json results_ = Json::array();
};

}  // namespace

absl::Status RunBenchServing(ControlPlane& control, const BenchServingFlags& flags) {
  return BenchServing(control, flags).Execute();
}

}  // namespace trireme
