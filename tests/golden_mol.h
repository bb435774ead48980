// The golden Mixture-of-Logits files of tests/golden/mol: results of the published implementation
// in float64 (tests/golden/mol/README.md), as a model directory and as numbers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "models/mol_config.h"
#include "tests/reference/mol_reference.h"

namespace trireme {

struct GoldenMol {
  std::string name;
  MolConfig config;
  int64_t batch = 0, items = 0, k = 0, average_k = 0, each_k = 0;
  std::map<std::string, reference::MolTensor> tensors;   // floating point, "model." included
  std::map<std::string, std::vector<int64_t>> integers;  // input.user_ids, ref.topk_ids, ...
  const std::vector<double>& values(const std::string& name) const {
    return tensors.at(name).values;
  }
  std::vector<float> floats(const std::string& name) const;
  reference::MolCase Case() const;
  // Writes config.json and model.safetensors; every key gets `prefix`.
  void WriteModel(const std::string& dir, const std::string& prefix = "") const;
};
// "tiny_2x2x8", "rails_8x4x64" or "notebook_concat_c4".
GoldenMol ReadGoldenMol(const std::string& name);
std::vector<std::string> GoldenMolNames();

}  // namespace trireme
