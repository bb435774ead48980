// trireme bench latency | throughput: speed of the real step path, as a share of what this machine
// can do at best, measured in the same run: multiply-add rate for prefill; for decoding read
// bandwidth and that rate, for many sequences at once are bound by it.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/ceilings.h"
#include "kernels/philox.h"
#include "kernels/status.h"
#include "launch/output_files.h"
#include "launch/session.h"
#include "models/memory_plan.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr const char* kComparedRates[] = {"prefill_tokens_per_s", "decode_tokens_per_s",
                                          "tokens_per_s"};

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Json Summarise(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const double n = static_cast<double>(samples.size());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / n;
  double variance = 0.0;
  for (const double x : samples) variance += (x - mean) * (x - mean) / std::max(1.0, n - 1);
  const auto quantile = [&](double q) {
    return samples[static_cast<size_t>(std::ceil(q * n)) - 1];
  };
  return {{"mean", mean},
          {"deviation", std::sqrt(variance)},
          {"p50", quantile(0.5)},
          {"p99", quantile(0.99)}};
}

// "AMD EPYC 9654 96-Core Processor", or empty.
std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos)
      return line.substr(colon + 2);
  }
  return "";
}

// What one run of the workload took.
struct Run {
  double total = 0.0;  // seconds
  double ops = 0.0;    // of it in the model's ops, stage after stage
  EngineStats stats;
};

class Bench {
 public:
  Bench(ControlPlane& control, const BenchFlags& flags, bool latency)
      : control_(control),
        flags_(flags),
        latency_(latency),
        sequences_(latency ? flags.batch_size : flags.num_prompts) {}

  absl::Status Execute() {
    ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control_, flags_.model));
    if (topology.dp_size > 1) return UsageError("bench: replicas do not share work; use --dp 1");
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? Check() : absl::OkStatus()));
    ModelFlags model = flags_.model;
    if (latency_) model.max_num_seqs = sequences_;
    ASSIGN_OR_RETURN(worker_,
                     LoadWorker(control_, topology, model,
                                {.max_sequence_tokens = flags_.input_len + flags_.output_len,
                                 .sequences = sequences_}));
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? CheckBaseline() : absl::OkStatus()));
    for (int i = 0; i < flags_.warmup + flags_.iterations; ++i) {
      if (i >= flags_.warmup) RETURN_IF_ERROR(MeasureCeilings());
      RETURN_IF_ERROR(RunOnce(i));
    }
    RETURN_IF_ERROR(MeasureCeilings());
    return control_.Agree(control_.rank() == 0 ? Report() : absl::OkStatus());
  }

 private:
  // All ranks measure at the same time, since they share the machine; the sum is what they can do
  // together.
  // Before and after every run: on a shared machine they change within seconds.
  absl::Status MeasureCeilings() {
    control_.Barrier();
    const absl::StatusOr<Ceilings> mine = trireme::MeasureCeilings(worker_->stream());
    RETURN_IF_ERROR(control_.Agree(mine.status()));
    ByteWriter out;
    out.Put(*mine);
    Ceilings sum;
    for (const std::string& bytes : control_.AllGather(out.Take())) {
      sum.Add(ByteReader(bytes).Get<Ceilings>());
    }
    ceilings_.push_back(sum);
    return absl::OkStatus();
  }

  // Before minutes of measuring, not after.
  absl::Status Check() {
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags_.model.model_dir));
    const int64_t limit =
        flags_.model.max_model_len > 0 ? flags_.model.max_model_len : config.max_positions;
    if (flags_.input_len > limit - flags_.output_len) {
      return UsageError(absl::StrCat("--input-len ", flags_.input_len, " --output-len ",
                                     flags_.output_len, ": more than the ", limit,
                                     " tokens the model takes (--max-model-len)"));
    }
    RETURN_IF_ERROR(CheckOutputFiles({{"--save", flags_.save}}, {}, flags_.model.model_dir));
    return flags_.compare.empty() ? absl::OkStatus() : ReadBaseline();
  }

  absl::Status ReadBaseline() {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(flags_.compare));
    baseline_ = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    bool saved = baseline_.is_object();
    for (const char* key : kComparedRates)
      saved = saved && baseline_.contains(key) && baseline_[key].is_number();
    // Results from before there was quantisation do not say so.
    if (saved && !baseline_.contains("quantization"))
      baseline_["quantization"] = Name(Quantization::kNone);
    if (saved) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("--compare ", flags_.compare, ": not a saved bench result"));
  }

  // As soon as the worker tells what this run is.
  absl::Status CheckBaseline() const {
    if (flags_.compare.empty()) return absl::OkStatus();
    const Json now = Description();
    for (const char* key : {"bench", "model", "dtype", "quantization", "tp", "pp", "threads",
                            "sequences", "input_len", "output_len"}) {
      if (!baseline_.contains(key) || baseline_[key] != now[key]) {
        return absl::InvalidArgumentError(absl::StrCat("--compare ", flags_.compare, ": its \"",
                                                       key,
                                                       "\" is not this run's; compare equal runs"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status RunOnce(int iteration) {
    Run run;
    absl::Status status;
    const double before = worker_->op_seconds();
    if (control_.rank() == worker_->leader()) {
      status = RunWorkload(&run);
    } else {
      status = worker_->Run();
    }
    RETURN_IF_ERROR(control_.Agree(status));
    run.ops = SumOverStages(worker_->op_seconds() - before);
    if (iteration >= flags_.warmup) runs_.push_back(run);
    return absl::OkStatus();
  }

  // Of each stage the slowest rank's seconds.
  double SumOverStages(double mine) {
    ByteWriter out;
    out.Put(mine);
    const std::vector<std::string> all = control_.AllGather(out.Take());
    const Topology& topology = worker_->groups().topology;
    std::vector<double> stages(topology.pp_size);
    for (int rank = 0; rank < control_.size(); ++rank) {
      double& stage = stages[topology.PpIndex(rank)];
      stage = std::max(stage, ByteReader(all[rank]).Get<double>());
    }
    return std::accumulate(stages.begin(), stages.end(), 0.0);
  }

  // With one step in flight, what its ops do not take is the cost of the host.
  bool OneStepAtATime() const {
    return worker_->groups().topology.pp_size == 1 ||
           (sequences_ == 1 && flags_.input_len <= worker_->options().max_num_batched_tokens);
  }

  absl::Status RunWorkload(Run* run) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, Engine::Create(*worker_, nullptr));
    const Clock::time_point begin = Clock::now();
    for (int64_t s = 0; s < sequences_; ++s) {
      Request request;
      request.id = static_cast<uint64_t>(s);
      request.max_tokens = flags_.output_len;
      for (int64_t t = 0; t < flags_.input_len; ++t) {
        const uint32_t bits =
            Philox4x32({{static_cast<uint32_t>(t), static_cast<uint32_t>(s), 0, 0}}, 1, 0).x[0];
        request.prompt.push_back(static_cast<TokenId>(bits % worker_->config().vocab_size));
      }
      RETURN_IF_ERROR(engine->Submit(std::move(request), [](const TokenOutput&) {}));
    }
    const absl::Status status = engine->Drain();
    run->total = SecondsSince(begin);
    run->stats = engine->Stats();
    return status;
  }

  // Bytes the run's decode steps had to read: each time all weights of the model but the embedding
  // rows it does not touch, and of the cache what its sequences attended to.
  double DecodeBytes(const EngineStats& stats) const {
    const ModelConfig& config = worker_->config();
    const auto size = static_cast<double>(SizeOf(worker_->dtype()));
    double weights = static_cast<double>(
        PlanRankBytes(config, {}, worker_->dtype(), {}, worker_->options().quantization)[0]
            .weight_bytes);
    if (!config.tied_head)
      weights -= size * static_cast<double>(config.vocab_size * config.hidden_size);
    const double kv = 2.0 * AttendedPositions(stats) * config.num_kv_heads * config.head_dim;
    return weights * static_cast<double>(stats.decode_steps) + kv * size;
  }
  // Their multiply-adds: the bound, instead of reading, where many sequences share the weights.
  double DecodeFlops(const EngineStats& stats) const {
    const ModelConfig& config = worker_->config();
    const double head = static_cast<double>(config.vocab_size * config.hidden_size);
    return 2.0 * (LayerParameters() + head) * static_cast<double>(stats.decode_step_tokens) +
           4.0 * AttendedPositions(stats) * config.num_heads * config.head_dim;
  }
  // Of the cache, by all decode steps in all layers. Prompts and answers are equally long, so that
  // a sliding window holds all sequences alike.
  double AttendedPositions(const EngineStats& stats) const {
    double positions = 0;
    for (int64_t layer = 0; layer < worker_->config().num_layers; ++layer) {
      const int64_t window = worker_->config().SlidingWindow(layer);
      positions += static_cast<double>(
          window > 0 ? std::min(stats.decode_kv_tokens, window * stats.decode_step_tokens)
                     : stats.decode_kv_tokens);
    }
    return positions;
  }
  // Of the layers and the last norm: what every token is multiplied with.
  double LayerParameters() const {
    const ModelConfig& config = worker_->config();
    return static_cast<double>(TotalParameters(config)) -
           static_cast<double>(config.vocab_size * config.hidden_size) * (config.tied_head ? 1 : 2);
  }
  // Multiply-adds of a prefill: two FLOPs a parameter of the layers and token; causal attention on
  // top.
  double PrefillFlops() const {
    const ModelConfig& config = worker_->config();
    const double tokens = static_cast<double>(flags_.input_len);
    const double attention =
        2.0 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens;
    const double head = 2.0 * config.vocab_size * config.hidden_size;  // the last token's logits
    return static_cast<double>(sequences_) * (2.0 * LayerParameters() * tokens + attention + head);
  }

  Json Description() const {
    const Topology& topology = worker_->groups().topology;
    return {{"bench", latency_ ? "latency" : "throughput"},
            {"version", TRIREME_VERSION},
            {"processor", ProcessorName()},
            {"model", flags_.model.model_dir},
            {"dtype", Name(worker_->dtype())},
            {"quantization", Name(worker_->options().quantization)},
            {"tp", topology.tp_size},
            {"pp", topology.pp_size},
            {"threads", worker_->stream().device().spec().threads},
            {"sequences", sequences_},
            {"input_len", flags_.input_len},
            {"output_len", flags_.output_len}};
  }

  Json Result() const {
    const bool decodes = std::all_of(runs_.begin(), runs_.end(),
                                     [](const Run& run) { return run.stats.decode_steps > 0; });
    std::vector<double> total, prefill, decode_step, host_step, read, matmul, prefill_share,
        decode_read_share, decode_matmul_share;
    double prefill_tokens = 0, decode_tokens = 0, prefill_seconds = 0, decode_seconds = 0,
           all_tokens = 0, all_seconds = 0;
    for (size_t i = 0; i < runs_.size(); ++i) {
      const EngineStats& stats = runs_[i].stats;
      const Ceilings &before = ceilings_[i], &after = ceilings_[i + 1];
      read.push_back((before.read_bytes_per_s + after.read_bytes_per_s) / 2);
      matmul.push_back(
          (before.MatMulFlops(worker_->dtype()) + after.MatMulFlops(worker_->dtype())) / 2);
      total.push_back(runs_[i].total * 1e3);
      prefill.push_back(stats.prefill_seconds * 1e3);
      host_step.push_back((runs_[i].total - runs_[i].ops) * 1e6 /
                          static_cast<double>(std::max<int64_t>(1, stats.steps)));
      prefill_share.push_back(PrefillFlops() / stats.prefill_seconds / matmul.back());
      if (decodes) {
        decode_step.push_back(stats.decode_seconds * 1e3 /
                              static_cast<double>(flags_.output_len - 1));
        decode_read_share.push_back(DecodeBytes(stats) / stats.decode_seconds / read.back());
        decode_matmul_share.push_back(DecodeFlops(stats) / stats.decode_seconds / matmul.back());
      }
      prefill_tokens += stats.prefill_tokens, prefill_seconds += stats.prefill_seconds;
      decode_tokens += stats.decode_tokens, decode_seconds += stats.decode_seconds;
      all_tokens += stats.prefill_tokens + stats.decode_tokens + sequences_;
      all_seconds += runs_[i].total;
    }
    const auto rate = [](double amount, double seconds) {
      return seconds > 0 ? amount / seconds : 0.0;
    };
    Json out = Description();
    out["total_ms"] = Summarise(total);
    out["prefill_ms"] = Summarise(prefill);
    // Of a batch that stays together; prompts that come in turns have no such step.
    if (latency_ && decodes) out["decode_step_ms"] = Summarise(decode_step);
    if (OneStepAtATime()) out["host_us_per_step"] = Summarise(host_step);
    out["prefill_tokens_per_s"] = rate(prefill_tokens, prefill_seconds);
    out["decode_tokens_per_s"] = rate(decode_tokens, decode_seconds);
    out["tokens_per_s"] = rate(all_tokens, all_seconds);
    out["read_bytes_per_s"] = Summarise(read);
    out["matmul_flops"] = Summarise(matmul);
    out["prefill_share_of_matmul"] = Summarise(prefill_share);
    if (decodes) out["decode_share_of_read_bandwidth"] = Summarise(decode_read_share);
    if (decodes) out["decode_share_of_matmul"] = Summarise(decode_matmul_share);
    return out;
  }

  absl::Status Report() {
    const Json out = Result();
    RETURN_IF_ERROR(WriteOut(control_, out.dump(2) + "\n"));
    if (!flags_.save.empty()) {
      std::ofstream file(flags_.save);
      file << out.dump(2) << "\n";
      if (!file.flush())
        return absl::UnavailableError(absl::StrCat("--save ", flags_.save, ": cannot be written"));
    }
    return flags_.compare.empty() ? absl::OkStatus() : Compare(out);
  }

  // Against the baseline read before the run: rates may fall by the tolerance.
  absl::Status Compare(const Json& now) const {
    std::string worse;
    for (const char* key : kComparedRates) {
      const double was = baseline_[key].get<double>(), is = now[key].get<double>();
      std::fprintf(stderr, "%-24s %12.2f -> %12.2f (%+.1f%%)\n", key, was, is,
                   was > 0 ? 100.0 * (is / was - 1.0) : 0.0);
      if (is < was * (1.0 - flags_.tolerance))
        absl::StrAppend(&worse, worse.empty() ? "" : ", ", key);
    }
    return worse.empty() ? absl::OkStatus()
                         : absl::FailedPreconditionError(
                               absl::StrCat("slower than ", flags_.compare, ": ", worse));
  }

  ControlPlane& control_;
  const BenchFlags& flags_;
  const bool latency_;
  const int64_t sequences_;
  std::unique_ptr<Worker> worker_;
  Json baseline_;                   // of --compare
  std::vector<Run> runs_;           // of the measured iterations
  std::vector<Ceilings> ceilings_;  // before each of them, and after the last
};

}  // namespace

absl::Status RunBenchLatency(ControlPlane& control, const BenchFlags& flags) {
  return Bench(control, flags, true).Execute();
}
absl::Status RunBenchThroughput(ControlPlane& control, const BenchFlags& flags) {
  return Bench(control, flags, false).Execute();
}

}  // namespace trireme
