// Writes Mixture-of-Logits heads with the shapes of published ones and random weights: for benches,
// dry runs and tests. What such a head finds means nothing. One thread calls.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/mol_config.h"

namespace trireme {

// "mol-8x4x64" (ML-1M), "mol-8x4x128" (ML-20M), "mol-8x8x32" (Amazon Books).
std::vector<std::string> MolRecipeNames();
// InvalidArgument lists the names there are.
absl::StatusOr<MolConfig> MolRecipeConfig(const std::string& like);

// Writes config.json and model.safetensors (f32) to a new or empty directory. Weights are normal
// with standard deviation 1 / sqrt(inputs), the cross gate's layers 0.4 and 2.5 times that, biases
// 0.1: the gate is then neither flat nor saturated. The same seed gives the same bytes. With
// `identity_projections` (REQUIRES: no GLU, D_q = Pq * d, D_x = Px * d) components are the raw
// embeddings.
absl::Status MakeMolCheckpoint(const MolConfig& config, const std::string& out_dir, uint64_t seed,
                               bool identity_projections = false);

// Normal numbers, a function of the seed and how many were drawn.
class NormalSequence {
 public:
  explicit NormalSequence(uint64_t seed) : seed_(seed) {}
  double Next();
  double NextUniform();  // in (0, 1)

 private:
  uint64_t seed_, next_ = 0;
};

}  // namespace trireme
