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
  int threads = 0;  // per rank; 0 = cores of the host / ranks on it
  std::string dtype = "auto";
  int64_t max_model_len = 0;
  int64_t max_num_seqs = 64;
  int64_t max_num_batched_tokens = 512;
  int64_t page_size = 16;
  std::string kv_cache_memory;  // e.g. "2GiB"; empty = what the requests need
};

struct GenerateFlags {
  ModelFlags model;
  std::vector<std::string> prompts;
  std::string prompts_file;
  std::vector<std::string> prompt_ids;  // "1,5,9"
  int64_t max_tokens = 128;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool json = false;
  bool echo = false;
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

}  // namespace trireme
