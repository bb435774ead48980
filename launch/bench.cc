// trireme bench latency | throughput: speed of the real step path, as a share of what this machine
// can do at best, measured in the same run: read bandwidth for decoding, multiply-add rate for
// prefill.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cpu/ceilings.h"
#include "kernels/status.h"
#include "launch/session.h"
#include "models/memory_plan.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"
#include "runtime/philox.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

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
    const absl::StatusOr<CpuCeilings> mine = MeasureCpuCeilings(worker_->stream());
    RETURN_IF_ERROR(control_.Agree(mine.status()));
    ByteWriter out;
    out.Put(*mine);
    CpuCeilings sum;
    for (const std::string& bytes : control_.AllGather(out.Take())) {
      ByteReader in(bytes);
      const CpuCeilings rank = in.Get<CpuCeilings>();
      sum.read_bytes_per_s += rank.read_bytes_per_s;
      sum.matmul_flops_f32 += rank.matmul_flops_f32;
      sum.matmul_flops_bf16 += rank.matmul_flops_bf16;
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
    if (!flags_.save.empty() && !std::ofstream(flags_.save, std::ios::app))
      return absl::UnavailableError(absl::StrCat("--save ", flags_.save, ": cannot be written"));
    if (flags_.compare.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::string text, ReadFile(flags_.compare));
    baseline_ = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!baseline_.is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--compare ", flags_.compare, ": not a saved bench result"));
    }
    return absl::OkStatus();
  }

  absl::Status RunOnce(int iteration) {
    Run run;
    absl::Status status;
    const double before = worker_->op_seconds();
    if (control_.rank() == worker_->leader()) {
      Engine engine(*worker_, nullptr);
      status = RunWorkload(engine, &run);
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

  absl::Status RunWorkload(Engine& engine, Run* run) {
    const Clock::time_point begin = Clock::now();
    for (int64_t s = 0; s < sequences_; ++s) {
      Request request;
      request.id = static_cast<uint64_t>(s);
      request.max_tokens = flags_.output_len;
      for (int64_t t = 0; t < flags_.input_len; ++t) {
        const uint32_t bits =
            Philox4x32({static_cast<uint32_t>(t), static_cast<uint32_t>(s), 0, 0}, {1, 0})[0];
        request.prompt.push_back(static_cast<TokenId>(bits % worker_->config().vocab_size));
      }
      RETURN_IF_ERROR(engine.Submit(std::move(request), [](const TokenOutput&) {}));
    }
    for (bool more = true; more;) {
      ASSIGN_OR_RETURN(more, engine.Step());
    }
    run->total = SecondsSince(begin);
    run->stats = engine.stats();
    return absl::OkStatus();
  }

  // Bytes a decode step must read: all weights of the model but the embedding rows it does not
  // touch, and the cache.
  double DecodeBytes() const {
    const ModelConfig& config = worker_->config();
    const double size = static_cast<double>(SizeOf(worker_->dtype()));
    double parameters = static_cast<double>(TotalParameters(config));
    if (!config.tied_head)
      parameters -= static_cast<double>(config.vocab_size * config.hidden_size);
    const double context = flags_.input_len + flags_.output_len / 2.0;
    const double kv =
        2.0 * config.num_layers * config.num_kv_heads * config.head_dim * context * sequences_;
    return (parameters + kv) * size;
  }
  // Multiply-adds of a prefill: two FLOPs a parameter of the layers and token; causal attention on
  // top.
  double PrefillFlops() const {
    const ModelConfig& config = worker_->config();
    const double embeddings =
        static_cast<double>(config.vocab_size * config.hidden_size) * (config.tied_head ? 1 : 2);
    const double layers = static_cast<double>(TotalParameters(config)) - embeddings;
    const double tokens = static_cast<double>(flags_.input_len);
    const double attention =
        2.0 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens;
    const double head = 2.0 * config.vocab_size * config.hidden_size;  // the last token's logits
    return static_cast<double>(sequences_) * (2.0 * layers * tokens + attention + head);
  }

  double MatmulCeiling(const CpuCeilings& ceilings) const {
    return worker_->dtype() == DType::kBF16 ? ceilings.matmul_flops_bf16
                                            : ceilings.matmul_flops_f32;
  }

  Json Description() const {
    const Topology& topology = worker_->groups().topology;
    return {{"bench", latency_ ? "latency" : "throughput"},
            {"version", TRIREME_VERSION},
            {"processor", ProcessorName()},
            {"model", flags_.model.model_dir},
            {"dtype", Name(worker_->dtype())},
            {"tp", topology.tp_size},
            {"pp", topology.pp_size},
            {"threads", worker_->stream().device().spec().threads},
            {"sequences", sequences_},
            {"input_len", flags_.input_len},
            {"output_len", flags_.output_len}};
  }

  Json Result() const {
    const bool steps = latency_ && flags_.output_len > 1;
    std::vector<double> total, prefill, decode_step, host_step, read, matmul, prefill_share,
        decode_share;
    double prefill_tokens = 0, decode_tokens = 0, prefill_seconds = 0, decode_seconds = 0,
           all_tokens = 0, all_seconds = 0;
    for (size_t i = 0; i < runs_.size(); ++i) {
      const EngineStats& stats = runs_[i].stats;
      const CpuCeilings &before = ceilings_[i], &after = ceilings_[i + 1];
      read.push_back((before.read_bytes_per_s + after.read_bytes_per_s) / 2);
      matmul.push_back((MatmulCeiling(before) + MatmulCeiling(after)) / 2);
      total.push_back(runs_[i].total * 1e3);
      prefill.push_back(stats.prefill_seconds * 1e3);
      host_step.push_back((runs_[i].total - runs_[i].ops) * 1e6 /
                          static_cast<double>(std::max<int64_t>(1, stats.steps)));
      prefill_share.push_back(PrefillFlops() / stats.prefill_seconds / matmul.back());
      if (steps) {
        const double step = stats.decode_seconds / static_cast<double>(flags_.output_len - 1);
        decode_step.push_back(step * 1e3);
        decode_share.push_back(DecodeBytes() / step / read.back());
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
    if (steps) out["decode_step_ms"] = Summarise(decode_step);
    if (OneStepAtATime()) out["host_us_per_step"] = Summarise(host_step);
    out["prefill_tokens_per_s"] = rate(prefill_tokens, prefill_seconds);
    out["decode_tokens_per_s"] = rate(decode_tokens, decode_seconds);
    out["tokens_per_s"] = rate(all_tokens, all_seconds);
    out["read_bytes_per_s"] = Summarise(read);
    out["matmul_flops"] = Summarise(matmul);
    out["prefill_share_of_matmul"] = Summarise(prefill_share);
    if (steps) out["decode_share_of_read_bandwidth"] = Summarise(decode_share);
    return out;
  }

  absl::Status Report() {
    const Json out = Result();
    RETURN_IF_ERROR(WriteOut(out.dump(2) + "\n"));
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
    for (const char* key : {"bench", "model", "dtype", "tp", "pp", "threads", "sequences",
                            "input_len", "output_len"}) {
      if (!baseline_.contains(key) || baseline_[key] != now[key]) {
        return absl::InvalidArgumentError(absl::StrCat("--compare ", flags_.compare, ": its \"",
                                                       key,
                                                       "\" is not this run's; compare equal runs"));
      }
    }
    std::string worse;
    for (const char* key : {"prefill_tokens_per_s", "decode_tokens_per_s", "tokens_per_s"}) {
      if (!baseline_.contains(key) || !baseline_[key].is_number()) {
        return absl::InvalidArgumentError(
            absl::StrCat("--compare ", flags_.compare, ": \"", key, "\" is not a number"));
      }
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
  Json baseline_;                      // of --compare
  std::vector<Run> runs_;              // of the measured iterations
  std::vector<CpuCeilings> ceilings_;  // before each of them, and after the last
};

}  // namespace

absl::Status RunBenchLatency(ControlPlane& control, const BenchFlags& flags) {
  return Bench(control, flags, true).Execute();
}
absl::Status RunBenchThroughput(ControlPlane& control, const BenchFlags& flags) {
  return Bench(control, flags, false).Execute();
}

}  // namespace trireme
