// MolConfig: config.json of a Mixture-of-Logits head as plain fields, and the checkpoint names that
// follow from it. A model directory is this file and model.safetensors.
//
// {"model_type": "mol",
//  "query_dim": D_q, "item_dim": D_x,          sizes of the raw embeddings
//  "query_components": P_q, "item_components": P_x, "component_dim": d,
//  "query_hidden": 512, "item_hidden": 0,      GLU before the projection; 0 = none
//  "query_nonlinearity": "swiglu",             or "geglu"; item_nonlinearity likewise
//  "uid_hash_sizes": [6040],                   user-id tables; each is the last of the P_q
//  "l2_norm": true, "eps": 1e-6, "temperature": 0.05,
//  "pairing": "all",                           or "diagonal"
//  "gating": "glu_silu",                       or "concat_relu"
//  "gating_query_hidden": 128, "gating_item_hidden": 128, "gating_qi_hidden": 128,   glu_silu
//  "gating_hidden": 128}                                                             concat_relu
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/mol_ops.h"

namespace trireme {

struct MolConfig {
  int64_t query_dim = 0, item_dim = 0;
  int64_t query_components = 0, item_components = 0, component_dim = 0;
  int64_t query_hidden = 0, item_hidden = 0;  // 0 = the projection is one linear layer
  bool query_geglu = false, item_geglu = false;
  std::vector<int64_t> uid_hash_sizes;
  bool l2_norm = true;
  double eps = 1e-6;
  double temperature = 1.0;
  MolPairing pairing = MolPairing::kAll;
  MolGating gating = MolGating::kGluSilu;
  int64_t gating_query_hidden = 0, gating_item_hidden = 0;
  int64_t gating_qi_hidden = 0;  // 0: the cross gate is one linear layer
  int64_t gating_hidden = 0;     // of concat_relu

  MolShape shape() const;
  // Query components that the projection makes; user-id tables make the rest.
  int64_t projected_components() const {
    return query_components - static_cast<int64_t>(uid_hash_sizes.size());
  }
};

// Parses the text of config.json; `name` is what error lines call the file. Sizes are bounded.
absl::StatusOr<MolConfig> ParseMolConfig(const std::string& json, const std::string& name);
absl::StatusOr<MolConfig> LoadMolConfig(const std::string& model_dir);
// The text of a config.json that ParseMolConfig reads back.
std::string MolConfigJson(const MolConfig& config);

struct MolWeightSpec {
  std::string name;  // the reference's state_dict key, without "module._ndp_module."
  std::vector<int64_t> dims;
};
// Every tensor of the head, in a fixed order.
std::vector<MolWeightSpec> MolWeightSpecs(const MolConfig& config);

}  // namespace trireme
