// What the model commands share between parsing flags and running the model: topology, request
// sizes, loading with a progress line, and the report of bytes per rank.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launch/commands.h"
#include "models/config.h"
#include "parallel/topology.h"

namespace trireme {

// Sizes a command needs beyond its flags; 0 = no opinion.
struct Demand {
  int64_t max_sequence_tokens = 0;  // longest prompt + output
  int64_t sequences = 0;            // of one replica at once
  int64_t logit_rows = 0;
};

// Reads the model's config on rank 0 and agrees with all ranks on the layout. Collective.
absl::StatusOr<Topology> AgreeOnTopology(ControlPlane& control, const ModelFlags& flags);

// "bf16", "bfloat16", "half", ...; nullopt for "auto". Usage error otherwise.
absl::StatusOr<std::optional<DType>> ParseDType(const std::string& text);
// "512", "64MiB", "2G". Usage error otherwise.
absl::StatusOr<int64_t> ParseBytes(const std::string& flag, const std::string& text);

// Loads the model on all ranks. Collective. Loading that takes more than a second shows one
// progress line on a terminal.
absl::StatusOr<std::unique_ptr<Worker>> LoadWorker(ControlPlane& control, const Topology& topology,
                                                   const ModelFlags& flags, const Demand& demand);

// The status of a file that rank 0 reads: its text, or one line naming the file.
absl::StatusOr<std::string> ReadFile(const std::string& path);

// "weights 1.2 GiB + KV 64.0 MiB on the largest rank". Collective; the text is for rank 0.
std::string DescribeBytesPerRank(const Worker& worker);
std::string HumanBytes(double bytes);

// Writes to standard output and flushes; an error when nobody can read it.
absl::Status WriteOut(const std::string& text);

}  // namespace trireme
