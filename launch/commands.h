// The subcommands of `trireme`. Each runs on every rank (collectively) and returns the same status
// everywhere; rank 0 alone writes to the terminal. A usage error (wrong flag, wrong world size) is
// marked so that the exit status is 2.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"
#include "parallel/control_plane.h"
#include "runtime/request.h"
#include "runtime/tokenizer.h"
#include "runtime/worker.h"

namespace trireme {

absl::Status UsageError(const std::string& message);
bool IsUsageError(const absl::Status& status);

// Flags of every command that runs a model.
struct ModelFlags {
  std::string model_dir;
  int tp = 0, pp = 0, dp = 0;  // 0 = chosen from the world size
  std::string device = "auto";
  std::string collectives = "auto";
  bool allow_shared_gpu = false;
  bool no_graphs = false;
  bool dependent_launches = false;
  std::string matmul = "own";
  int threads = 0;  // per rank; 0 = cores of the host / ranks on it
  std::string dtype = "auto";
  std::string quantization = "none";
  int64_t max_model_len = 0;
  int64_t max_num_seqs = 64;
  int64_t max_num_batched_tokens = 512;
  int64_t page_size = 16;
  std::string kv_cache_memory;  // e.g. "2GiB"; empty = what the requests need
  std::string memory_limit;     // of all a rank holds on its device; empty = none
  std::string pp_split;         // "9,7": layers of each stage; empty = balanced
};

// Flags of the commands that run an engine.
struct ServingFlags {
  std::string policy = "continuous";
  bool no_prefix_cache = false;
  bool no_overlap = false;
  int64_t ageing_steps = 64;
  int64_t max_queue = 0;
  std::string metrics_file;  // Prometheus text of the leader, written at the end
  std::string trace_file;    // Chrome trace of all ranks
};

// Flags of every command that runs on several ranks.
struct JobFlags {
  double failure_timeout = 5.0;  // seconds; 0 = nobody watches
  double start_timeout = 60.0;   // seconds, for all ranks to come to MPI_Init
  std::string flight_records;    // folder; empty = TMPDIR or /tmp, "none" = not written
  int ranks = 0;                 // 0 = this process is a rank; else it starts that many
  int max_restarts = 0;          // after failures of a rank
  std::string journal, history;  // set by the supervisor for its ranks: launch/supervisor.h
};
// Has the ranks watch each other. Collective; before anything that may fail on one rank alone.
absl::Status WatchRanks(ControlPlane& control, const JobFlags& flags);

class JournalWriter;
struct JobHistory;

struct GenerateFlags {
  ModelFlags model;
  ServingFlags serving;
  std::vector<std::string> prompts;
  std::string prompts_file;
  std::vector<std::string> prompt_ids;  // "1,5,9"
  int64_t max_tokens = 128;
  int32_t n = 1;
  int32_t priority = 0;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool json = false;
  bool echo = false;
  // Of a supervised job, on rank 0; else null.
  JournalWriter* journal = nullptr;
  const JobHistory* history = nullptr;
};
absl::Status RunGenerate(ControlPlane& control, const GenerateFlags& flags);

struct EvalFlags {
  ModelFlags model;
  std::string text_file, ids_file, logits_out;
  bool json = false;
};
absl::Status RunEval(ControlPlane& control, const EvalFlags& flags);

struct InspectFlags {
  ModelFlags model;
  bool ledger = false;
  bool json = false;
};
absl::Status RunInspect(ControlPlane& control, const InspectFlags& flags);

struct MakeCheckpointFlags {
  std::string like, out_dir, dtype = "bf16";
  int64_t layers = 0;
  uint64_t seed = 0;
};
absl::Status RunMakeCheckpoint(ControlPlane& control, const MakeCheckpointFlags& flags);

struct BenchFlags {
  ModelFlags model;
  int64_t input_len = 128, output_len = 32, batch_size = 1, num_prompts = 16;
  int warmup = 1, iterations = 5;
  std::string save, compare;
  double tolerance = 0.1;  // a regression is a mean worse by more than this share
};
absl::Status RunBenchLatency(ControlPlane& control, const BenchFlags& flags);
absl::Status RunBenchThroughput(ControlPlane& control, const BenchFlags& flags);

struct BenchServingFlags {
  ModelFlags model;
  ServingFlags serving;
  std::vector<std::string> policies = {"continuous"};
  int64_t num_prompts = 64;
  int64_t min_len = 16, max_len = 2048;  // of prompt and of output, log-uniform between
  int64_t shared_prefix = 0;             // tokens that all prompts begin with
  std::vector<double> request_rates;     // a second, Poisson; empty = all at once
  std::string arrivals_file;             // recorded, instead of all of these: launch/arrivals.h
  double slo_first_token_ms = 1000.0, slo_time_per_output_token_ms = 100.0;
  uint64_t seed = 1;
};
absl::Status RunBenchServing(ControlPlane& control, const BenchServingFlags& flags);

struct BenchSchedulerFlags {
  int64_t running = 1024;
  int64_t steps = 2000;
};
absl::Status RunBenchScheduler(ControlPlane& control, const BenchSchedulerFlags& flags);

}  // namespace trireme
