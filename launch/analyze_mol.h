// trireme analyze mol: what a search must compute and read, against what a machine can do. Runs
// nothing but, for --hardware this, the measurement of the machine's ceilings.
#pragma once

#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "launch/commands.h"

namespace trireme {

struct AnalyzeMolFlags {
  std::string model_dir;
  std::string storage = "bf16", hardware = "this";
  int64_t items = 10'000'000;
  std::vector<int64_t> batch = {1, 8, 32, 128, 512};
  bool json = false;
};
CLI::App* AddAnalyzeMol(CLI::App& app, AnalyzeMolFlags* flags);
absl::Status RunAnalyzeMol(ControlPlane& control, const AnalyzeMolFlags& flags);

}  // namespace trireme
