// Planted data for judging approximate search: with random weights every item is as good as the
// next, and recall means nothing. Items and queries are points z of 200 clusters in R^16; component
// p of a point is unit((A + alpha A'_p) z + noise), with the same A for queries and items. `alpha`
// says how different the components are. The head's projections are the identity, so that raw
// embeddings are the components. Any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "models/mol_config.h"

namespace trireme {

struct PlantedMolOptions {
  int64_t query_components = 8, item_components = 4, component_dim = 64;
  double alpha = 0.4;
  double noise = 0.3;
  uint64_t seed = 1;
};

class PlantedMol {
 public:
  explicit PlantedMol(const PlantedMolOptions& options);
  const MolConfig& config() const { return config_; }
  // Rows [first, first + count): a row depends on the options and its number alone.
  void FillItems(int64_t first, int64_t count, float* out) const;    // [count, Px * d]
  void FillQueries(int64_t first, int64_t count, float* out) const;  // [count, Pq * d]
  // config.json and model.safetensors into a new or empty directory: identity projections, random
  // gates.
  absl::Status WriteModel(const std::string& dir) const;

 private:
  using Map = std::vector<double>;  // [d, 16]
  std::vector<Map> Maps(int64_t components, uint64_t stream) const;
  void FillRow(const std::vector<Map>& maps, uint64_t stream, int64_t row, float* out) const;

  PlantedMolOptions options_;
  MolConfig config_;
  Map shared_;
  std::vector<double> centres_;  // [200, 16]
  std::vector<Map> query_maps_, item_maps_;
};

}  // namespace trireme
