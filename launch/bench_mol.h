// trireme bench mol: retrieval on planted data against the machine's own ceilings and a naive eager
// twin.
#pragma once

#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "launch/commands.h"

namespace trireme {

struct BenchMolFlags {
  std::string shape = "8x4x64", storage = "f32";
  std::vector<int64_t> items = {200000}, batch = {1, 8, 32};
  int64_t k = 100;
  double alpha = 0.4;
  int iterations = 5, threads = 0;
  std::string scratch, save;
  uint64_t seed = 1;
};
CLI::App* AddBenchMol(CLI::App* bench, BenchMolFlags* flags, JobFlags* job);
absl::Status RunBenchMol(ControlPlane& control, const BenchMolFlags& flags);

}  // namespace trireme
