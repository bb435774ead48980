#include "launch/session.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "models/memory_plan.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr char kUsagePayload[] = "trireme/usage";

// Cores this process may use, divided by the ranks of the host that may use some of them too: a
// launcher may have bound each rank to its own, or all of them to the same few. Collective.
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

absl::StatusOr<Topology> ChooseTopology(const ControlPlane& control, const ModelFlags& flags) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model_dir));
  const absl::StatusOr<Topology> topology = ResolveTopology(
      flags.tp, flags.pp, flags.dp, control.size(), config.num_heads, config.num_layers,
      [&config](int tp) { return CheckTensorParallel(config, {.tp_size = tp}).ok(); });
  const absl::Status fits =
      topology.ok() ? CheckTensorParallel(config, *topology) : topology.status();
  if (!fits.ok()) return UsageError(std::string(fits.message()));
  return topology;
}

}  // namespace

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
  if (unit == "KB") scale = 1e3;
  if (unit == "MB") scale = 1e6;
  if (unit == "GB") scale = 1e9;
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
  while (in.read(piece, sizeof(piece)) || in.gcount() > 0) text.append(piece, in.gcount());
  if (!in.is_open() || in.bad())
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  return text;
}

absl::StatusOr<Topology> AgreeOnTopology(ControlPlane& control, const ModelFlags& flags) {
  absl::StatusOr<Topology> topology = Topology{};
  if (control.rank() == 0) topology = ChooseTopology(control, flags);
  RETURN_IF_ERROR(control.Agree(topology.status()));
  ByteWriter out;
  out.Put(*topology);
  std::string bytes = out.Take();
  control.Broadcast(&bytes);
  return ByteReader(bytes).Get<Topology>();
}

absl::StatusOr<std::unique_ptr<Worker>> LoadWorker(ControlPlane& control, const Topology& topology,
                                                   const ModelFlags& flags, const Demand& demand) {
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseDType(flags.dtype));
  absl::StatusOr<ModelConfig> config = LoadModelConfig(flags.model_dir);
  RETURN_IF_ERROR(control.Agree(config.status()));
  WorkerOptions options;
  options.device.name = flags.device == "auto" ? "cpu" : flags.device;
  const int fair_threads = ThreadsPerRank(control);
  options.device.threads = flags.threads > 0 ? flags.threads : fair_threads;
  options.device.local_index = control.local_rank();
  options.dtype = dtype;
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
  const DType storage = dtype.value_or(config->dtype);
  if (!flags.kv_cache_memory.empty()) {
    ASSIGN_OR_RETURN(const int64_t budget, ParseBytes("--kv-cache-memory", flags.kv_cache_memory));
    int64_t per_token = 1;  // on the rank that holds most
    for (const RankBytes& rank : PlanRankBytes(*config, topology, storage)) {
      per_token = std::max(per_token, rank.kv_bytes_per_token);
    }
    const int64_t page_bytes = per_token * options.page_size;
    if (budget < page_bytes) {
      return UsageError(absl::StrCat("--kv-cache-memory ", flags.kv_cache_memory, ": one page of ",
                                     options.page_size, " tokens takes ", page_bytes, " bytes"));
    }
    const int64_t useful = options.max_num_seqs *
                           ((options.max_model_len + options.page_size - 1) / options.page_size);
    options.num_pages = std::min(budget / page_bytes, useful);
  }
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
  int64_t weights = 0, kv = 0;
  const std::vector<std::string> all = worker.control().Gather(out.Take());
  for (const std::string& bytes : all) {
    ByteReader in(bytes);
    weights = std::max(weights, in.Get<int64_t>());
    kv = std::max(kv, in.Get<int64_t>());
  }
  return absl::StrCat("weights ", HumanBytes(weights), " + KV ", HumanBytes(kv),
                      all.size() > 1 ? " on the largest rank" : "");
}

absl::Status WriteOut(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    return absl::UnavailableError(
        absl::StrCat("standard output cannot be written: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace trireme
