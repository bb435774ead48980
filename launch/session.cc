#include "launch/session.h"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/cuda_module.h"
#include "kernels/status.h"
#include "launch/device_choice.h"
#include "launch/supervisor.h"
#include "models/memory_plan.h"
#include "parallel/failure_detector.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr char kUsagePayload[] = "trireme/usage";
constexpr int64_t kMaxInputBytes = int64_t{1} << 30;  // of prompts and the like: all are kept

// "loading 1.2 GiB of 2.3 GiB, 1.1 GiB/s", over itself, once loading has taken a second.
class ProgressLine {
 public:
  ~ProgressLine() {
    if (open_) std::fputc('\n', stderr);
  }
  void Update(int64_t bytes, int64_t total) {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    if (seconds < 1.0 || (bytes < total && now - last_ < std::chrono::milliseconds(100))) return;
    last_ = now;
    open_ = true;
    std::fprintf(stderr, "\rloading %s of %s, %s/s   ", HumanBytes(bytes).c_str(),
                 HumanBytes(total).c_str(), HumanBytes(bytes / seconds).c_str());
    std::fflush(stderr);
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now(), last_ = begin_;
  bool open_ = false;
};

// The same on all ranks; rank 0 says why it is the CPU beside GPUs.
std::string DeviceOfAuto(ControlPlane& control, bool allow_shared_gpu) {
  const absl::StatusOr<std::vector<std::string>> devices = CudaDevices();
  ByteWriter out;
  out.PutString(control.host());
  out.PutString(devices.ok() ? absl::StrJoin(*devices, "\n") : "");
  const bool driver = access("/proc/driver/nvidia/version", F_OK) == 0;
  out.PutString(devices.ok() || !driver ? "" : std::string(devices.status().message()));
  std::vector<GpusOfRank> ranks;
  for (const std::string& bytes : control.AllGather(out.Take())) {
    ByteReader in(bytes);
    GpusOfRank rank{.host = in.GetString()};
    rank.gpus = absl::StrSplit(in.GetString(), '\n', absl::SkipEmpty());
    rank.why_none = in.GetString();
    ranks.push_back(std::move(rank));
  }
  const DeviceChoice choice = ChooseDevice(ranks, allow_shared_gpu);
  if (control.rank() == 0 && !choice.warning.empty())
    std::fprintf(stderr, "trireme: warning: %s\n", choice.warning.c_str());
  return choice.device;
}

}  // namespace

// A launcher may have bound each rank to cores of its own, or all of them to the same few.
int ThreadsPerRank(ControlPlane& control) {
  struct Place {
    char host[64] = {};
    cpu_set_t cores{};
  } mine;
  control.host().copy(mine.host, sizeof(mine.host) - 1);
  if (sched_getaffinity(0, sizeof(mine.cores), &mine.cores) != 0) CPU_SET(0, &mine.cores);
  ByteWriter out;
  out.Put(mine);
  int sharing = 0;
  for (const std::string& bytes : control.AllGather(out.Take())) {
    const Place other = ByteReader(bytes).Get<Place>();
    cpu_set_t common;
    CPU_AND(&common, &mine.cores, &other.cores);
    if (std::strcmp(mine.host, other.host) == 0 && CPU_COUNT(&common) > 0) ++sharing;
  }
  return std::max(1, CPU_COUNT(&mine.cores) / sharing);
}

absl::Status UsageError(const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kUsagePayload, absl::Cord("1"));
  return status;
}
bool IsUsageError(const absl::Status& status) {
  return status.GetPayload(kUsagePayload).has_value();
}

absl::StatusOr<std::optional<DType>> ParseDType(const std::string& text) {
  if (text == "auto") return std::optional<DType>();
  if (text == "f32" || text == "float32" || text == "float") return std::optional(DType::kF32);
  if (text == "bf16" || text == "bfloat16") return std::optional(DType::kBF16);
  if (text == "f16" || text == "float16" || text == "half" || text == "fp16")
    return std::optional(DType::kF16);
  return UsageError(absl::StrCat("--dtype ", text, ": must be auto, f32, bf16 or f16"));
}

absl::StatusOr<Quantization> ParseQuantization(const std::string& text) {
  if (const auto known = QuantizationNamed(text); known) return *known;
  return UsageError(absl::StrCat("--quantization ", text, ": must be none, fp8 or fp8-dynamic"));
}

absl::StatusOr<int64_t> ParseBytes(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const double value = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  double scale = 0.0;
  if (unit.empty() || unit == "B") scale = 1.0;
  if (unit == "K" || unit == "KiB") scale = 1024.0;
  if (unit == "M" || unit == "MiB") scale = 1024.0 * 1024;
  if (unit == "G" || unit == "GiB") scale = 1024.0 * 1024 * 1024;
  if (unit == "T" || unit == "TiB") scale = 1024.0 * 1024 * 1024 * 1024;
  if (unit == "KB") scale = 1e3;
  if (unit == "MB") scale = 1e6;
  if (unit == "GB") scale = 1e9;
  if (unit == "TB") scale = 1e12;
  if (end == text.c_str() || scale == 0.0 || !(value > 0.0) || value * scale > 1e15) {
    return UsageError(absl::StrCat(flag, " ", text,
                                   ": must be a positive number of bytes such as 512MiB or 2GiB"));
  }
  return static_cast<int64_t>(value * scale);
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  std::string text;
  char piece[65536];
  while (in.read(piece, sizeof(piece)) || in.gcount() > 0) {
    if (static_cast<int64_t>(text.size()) + in.gcount() > kMaxInputBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": has more than the ", HumanBytes(kMaxInputBytes), " that are read of a file"));
    }
    text.append(piece, in.gcount());
  }
  if (!in.is_open() || in.bad())
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  return text;
}

absl::StatusOr<Topology> ChooseTopology(int ranks, const ModelFlags& flags) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model_dir));
  const absl::StatusOr<Topology> topology = ResolveTopology(
      flags.tp, flags.pp, flags.dp, ranks, config.num_heads, config.num_layers,
      [&config](int tp) { return CheckTensorParallel(config, {.tp_size = tp}).ok(); });
  const absl::Status fits =
      topology.ok() ? CheckTensorParallel(config, *topology) : topology.status();
  if (!fits.ok()) return UsageError(std::string(fits.message()));
  return topology;
}

absl::StatusOr<Topology> AgreeOnTopology(ControlPlane& control, const ModelFlags& flags) {
  absl::StatusOr<Topology> topology = Topology{};
  if (control.rank() == 0) topology = ChooseTopology(control.size(), flags);
  RETURN_IF_ERROR(control.Agree(topology.status()));
  ByteWriter out;
  out.Put(*topology);
  std::string bytes = out.Take();
  control.Broadcast(&bytes);
  return ByteReader(bytes).Get<Topology>();
}

absl::StatusOr<std::vector<int64_t>> ParseSplit(const std::string& text) {
  std::vector<int64_t> split;
  for (const auto piece : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    int64_t layers = 0;
    if (!absl::SimpleAtoi(piece, &layers))
      return UsageError(absl::StrCat("--pp-split ", text, ": write layers of each stage as 9,7"));
    split.push_back(layers);
  }
  return split;
}

absl::StatusOr<BatchPolicy> ParsePolicy(const std::string& text) {
  if (text == "continuous") return BatchPolicy::kContinuous;
  if (text == "dynamic") return BatchPolicy::kDynamic;
  if (text == "static") return BatchPolicy::kStatic;
  return UsageError(absl::StrCat("--policy ", text, ": must be continuous, dynamic or static"));
}

absl::StatusOr<EngineOptions> EngineOptionsOf(const ServingFlags& flags) {
  EngineOptions options;
  ASSIGN_OR_RETURN(options.policy, ParsePolicy(flags.policy));
  options.prefix_cache = !flags.no_prefix_cache;
  options.overlap = !flags.no_overlap;
  options.ageing_steps = flags.ageing_steps;
  options.max_queue = flags.max_queue;
  return options;
}

absl::Status WriteMetrics(const ServingFlags& flags, const EngineStats& stats) {
  if (flags.metrics_file.empty()) return absl::OkStatus();
  std::ofstream file(flags.metrics_file);
  file << PrometheusText(stats);
  if (file.flush()) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("--metrics ", flags.metrics_file, ": cannot be written"));
}

absl::StatusOr<int64_t> NumPages(const ModelFlags& flags, const ModelConfig& config,
                                 const Topology& topology, const WorkerOptions& options) {
  if (flags.kv_cache_memory.empty()) return 0;
  ASSIGN_OR_RETURN(const int64_t bytes, ParseBytes("--kv-cache-memory", flags.kv_cache_memory));
  const absl::StatusOr<int64_t> fit =
      PagesOfMemory(config, topology, options.dtype.value_or(config.dtype), options.page_size,
                    bytes, options.pp_split);
  if (!fit.ok()) {
    return UsageError(absl::StrCat("--kv-cache-memory ", flags.kv_cache_memory, ": ",
                                   std::string(fit.status().message())));
  }
  return std::min(options.most_pages(), *fit);
}

absl::StatusOr<int64_t> MemoryLimit(const ModelFlags& flags) {
  if (flags.memory_limit.empty()) return 0;
  return ParseBytes("--memory-limit", flags.memory_limit);
}

absl::StatusOr<std::unique_ptr<Worker>> LoadWorker(ControlPlane& control, const Topology& topology,
                                                   const ModelFlags& flags, const Demand& demand) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseDType(flags.dtype));
  ASSIGN_OR_RETURN(const Quantization quantization, ParseQuantization(flags.quantization));
  if (flags.device == "cpu" && flags.matmul == "cublaslt")
    return UsageError("--matmul cublaslt: is a GPU's, and --device cpu was given; leave one out");
  RETURN_IF_ERROR(control.EnterPhase(Phase::kLoad));
  absl::StatusOr<ModelConfig> config = LoadModelConfig(flags.model_dir);
  RETURN_IF_ERROR(control.Agree(config.status()));
  WorkerOptions options;
  options.device.name =
      flags.device == "auto" ? DeviceOfAuto(control, flags.allow_shared_gpu) : flags.device;
  options.device.allow_shared = options.groups.allow_shared_gpu = flags.allow_shared_gpu;
  options.device.dependent_launches = flags.dependent_launches;
  options.device.cublas_lt = flags.matmul == "cublaslt";
  if (flags.collectives == "nccl") options.groups.collectives = Collectives::kNccl;
  if (flags.collectives == "host") options.groups.collectives = Collectives::kHost;
  const int fair_threads = ThreadsPerRank(control);
  options.device.threads = flags.threads > 0 ? flags.threads : fair_threads;
  options.device.local_index = control.local_rank();
  options.graphs = !flags.no_graphs;
  if (control.rank() == 0) {
    options.warn = [](const std::string& line) {
      std::fprintf(stderr, "trireme: warning: %s\n", line.c_str());
    };
  }
  options.dtype = dtype;
  options.quantization = quantization;
  options.page_size = flags.page_size;
  options.max_num_batched_tokens = flags.max_num_batched_tokens;
  options.max_num_seqs =
      demand.sequences > 0 ? std::min(demand.sequences, flags.max_num_seqs) : flags.max_num_seqs;
  const int64_t limit = flags.max_model_len > 0 ? flags.max_model_len : config->max_positions;
  if (limit > config->max_positions) {
    return UsageError(absl::StrCat("--max-model-len ", limit, ": the model has ",
                                   config->max_positions,
                                   " positions (max_position_embeddings of its config.json)"));
  }
  options.max_model_len = limit;
  if (demand.max_sequence_tokens > 0)
    options.max_model_len = std::min(limit, std::max<int64_t>(demand.max_sequence_tokens, 2));
  options.max_logit_rows = std::max(options.max_num_seqs, demand.logit_rows);
  ASSIGN_OR_RETURN(options.pp_split, ParseSplit(flags.pp_split));
  if (absl::Status split = CheckSplit(*config, topology.pp_size, options.pp_split); !split.ok())
    return UsageError(std::string(split.message()));
  ASSIGN_OR_RETURN(options.num_pages, NumPages(flags, *config, topology, options));
  ASSIGN_OR_RETURN(options.memory_limit, MemoryLimit(flags));
  // On a terminal only, and ended before anything else is printed.
  ProgressLine line;
  if (control.rank() == 0 && isatty(STDERR_FILENO) != 0) {
    options.progress = [&line](int64_t bytes, int64_t total) { line.Update(bytes, total); };
  }
  return Worker::Load(control, topology, flags.model_dir, std::move(options));
}

std::string HumanBytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024.0 && unit < 4) bytes /= 1024.0, ++unit;
  return unit == 0 ? absl::StrFormat("%.0f B", bytes)
                   : absl::StrFormat("%.1f %s", bytes, units[unit]);
}

std::string DescribeBytesPerRank(const Worker& worker) {
  ByteWriter out;
  out.Put(worker.weight_bytes());
  out.Put(worker.kv_bytes());
  out.Put(worker.graph_stats().bytes);
  int64_t weights = 0, kv = 0, graphs = 0;
  const std::vector<std::string> all = worker.control().Gather(out.Take());
  for (const std::string& bytes : all) {
    ByteReader in(bytes);
    weights = std::max(weights, in.Get<int64_t>());
    kv = std::max(kv, in.Get<int64_t>());
    graphs = std::max(graphs, in.Get<int64_t>());
  }
  return absl::StrCat("weights ", HumanBytes(weights), " + KV ", HumanBytes(kv),
                      graphs > 0 ? absl::StrCat(" + graphs ", HumanBytes(graphs)) : "",
                      all.size() > 1 ? " on the largest rank" : "");
}

absl::Status WatchRanks(ControlPlane& control, const JobFlags& flags) {
  if (flags.failure_timeout == 0.0) return absl::OkStatus();
  FailureDetectorOptions options{.timeout_s = flags.failure_timeout,
                                 .record_dir = "",
                                 .says_interrupted = !StartedBySupervisor()};
  if (flags.flight_records != "none") {
    const char* const temporary = std::getenv("TMPDIR");
    std::string base = flags.flight_records;
    if (base.empty()) base = temporary != nullptr && *temporary != '\0' ? temporary : "/tmp";
    // The same for all ranks, and nobody else's: rank 0's process number at this second.
    options.record_dir = absl::StrCat(
        base, "/trireme-flight-",
        absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::LocalTimeZone()), "-", getpid());
    control.Broadcast(&options.record_dir);
  }
  return control.Watch(options);
}

absl::Status WriteOut(ControlPlane& control, const std::string& text) {
  const FlightRecorder::Outside outside(control.recorder());
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    return absl::UnavailableError(
        absl::StrCat("standard output cannot be written: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace trireme
