// What the model commands share between parsing flags and running the model: topology, request
// sizes, loading with a progress line, and the report of bytes per rank.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launch/commands.h"
#include "models/config.h"
#include "parallel/topology.h"
#include "runtime/engine.h"

namespace trireme {

// Sizes a command needs beyond its flags; 0 = no opinion.
struct Demand {
  int64_t max_sequence_tokens = 0;  // longest prompt + output
  int64_t sequences = 0;            // of one replica at once
  int64_t logit_rows = 0;
};

// Cores this process may use, divided by the ranks of the host that may use some of them too.
// Collective.
int ThreadsPerRank(ControlPlane& control);
// Of the model's config and the flags, for a job of `ranks` ranks.
absl::StatusOr<Topology> ChooseTopology(int ranks, const ModelFlags& flags);

// Reads the model's config on rank 0 and agrees with all ranks on the layout. Collective.
absl::StatusOr<Topology> AgreeOnTopology(ControlPlane& control, const ModelFlags& flags);

// "bf16", "bfloat16", "half", ...; nullopt for "auto". Usage error otherwise.
absl::StatusOr<std::optional<DType>> ParseDType(const std::string& text);
absl::StatusOr<Quantization> ParseQuantization(const std::string& text);
// "512", "64MiB", "2G". Usage error otherwise.
absl::StatusOr<int64_t> ParseBytes(const std::string& flag, const std::string& text);

// "9,7" to numbers; empty for "". Usage error otherwise.
absl::StatusOr<std::vector<int64_t>> ParseSplit(const std::string& text);

// KV pages of --kv-cache-memory, but no more than the requests can need; 0 = not given. `options`
// has its other sizes.
absl::StatusOr<int64_t> NumPages(const ModelFlags& flags, const ModelConfig& config,
                                 const Topology& topology, const WorkerOptions& options);
// Bytes of --memory-limit; 0 = not given.
absl::StatusOr<int64_t> MemoryLimit(const ModelFlags& flags);

absl::StatusOr<EngineOptions> EngineOptionsOf(const ServingFlags& flags);
absl::StatusOr<BatchPolicy> ParsePolicy(const std::string& text);
// Writes the Prometheus text where --metrics asks for it.
absl::Status WriteMetrics(const ServingFlags& flags, const EngineStats& stats);

// Loads the model on all ranks. Collective. Loading that takes more than a second shows one
// progress line on a terminal.
absl::StatusOr<std::unique_ptr<Worker>> LoadWorker(ControlPlane& control, const Topology& topology,
                                                   const ModelFlags& flags, const Demand& demand);

// The text of a file or pipe that rank 0 reads, or one line naming it. InvalidArgument where it
// does not end within 1 GiB.
absl::StatusOr<std::string> ReadFile(const std::string& path);

// "weights 1.2 GiB + KV 64.0 MiB on the largest rank", and what captured graphs hold where there
// are some. Collective; the text is for rank 0.
std::string DescribeBytesPerRank(const Worker& worker);
std::string HumanBytes(double bytes);

// Writes to standard output and flushes; an error when nobody can read it. Waits for the reader
// without counting as stuck.
absl::Status WriteOut(ControlPlane& control, const std::string& text);

}  // namespace trireme
