// trireme tune mol: the largest Mixture-of-Logits heads that answer within a latency and fit a
// memory, by a cost model that is checked against a measured search when the machine is this one.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "launch/commands.h"

namespace trireme {

struct TuneMolFlags {
  double latency_ms = 0, memory_gb = 0;
  std::string hardware = "this";
  int64_t items = 1'000'000, batch = 8;
  int shards = 1;
  int64_t cross_hidden = 128;
  bool means = false, json = false;
  std::string scratch;
};
CLI::App* AddTuneMol(CLI::App& app, TuneMolFlags* flags);
absl::Status RunTuneMol(ControlPlane& control, const TuneMolFlags& flags);

}  // namespace trireme
