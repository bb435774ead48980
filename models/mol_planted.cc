#include "models/mol_planted.h"

#include <cmath>

#include "kernels/status.h"
#include "models/mol_checkpoint.h"

namespace trireme {
namespace {

constexpr int64_t kPoint = 16, kClusters = 200;
constexpr double kSpread = 0.7;  // of a cluster

// Streams of random numbers, one for each thing that is drawn.
enum Stream : uint64_t { kShared, kCentres, kQueryMaps, kItemMaps, kQueries, kItems };

uint64_t StreamSeed(uint64_t seed, uint64_t stream, uint64_t row) {
  return (seed * 0x9e3779b97f4a7c15u + stream) * 0xbf58476d1ce4e5b9u + row * 0x94d049bb133111ebu;
}

}  // namespace

PlantedMol::PlantedMol(const PlantedMolOptions& options) : options_(options) {
  config_.query_components = options.query_components;
  config_.item_components = options.item_components;
  config_.component_dim = options.component_dim;
  config_.query_dim = options.query_components * options.component_dim;
  config_.item_dim = options.item_components * options.component_dim;
  config_.temperature = 0.05;
  config_.gating_query_hidden = config_.gating_item_hidden = config_.gating_qi_hidden = 128;
  NormalSequence shared(StreamSeed(options.seed, kShared, 0));
  shared_.resize(options.component_dim * kPoint);
  for (double& v : shared_) v = shared.Next();
  NormalSequence centres(StreamSeed(options.seed, kCentres, 0));
  centres_.resize(kClusters * kPoint);
  for (double& v : centres_) v = centres.Next();
  query_maps_ = Maps(options.query_components, kQueryMaps);
  item_maps_ = Maps(options.item_components, kItemMaps);
}

std::vector<PlantedMol::Map> PlantedMol::Maps(int64_t components, uint64_t stream) const {
  NormalSequence own(StreamSeed(options_.seed, stream, 0));
  std::vector<Map> maps(components, shared_);
  for (Map& map : maps) {
    for (double& v : map) v += options_.alpha * own.Next();
  }
  return maps;
}

void PlantedMol::FillRow(const std::vector<Map>& maps, uint64_t stream, int64_t row,
                         float* out) const {
  NormalSequence normal(StreamSeed(options_.seed, stream, static_cast<uint64_t>(row)));
  const auto cluster = static_cast<int64_t>(normal.NextUniform() * kClusters);
  double z[kPoint];
  for (int64_t r = 0; r < kPoint; ++r) {
    z[r] = centres_[cluster * kPoint + r] + kSpread * normal.Next();
  }
  const int64_t d = options_.component_dim;
  std::vector<double> v(d);
  for (const Map& map : maps) {
    double squares = 0;
    for (int64_t k = 0; k < d; ++k) {
      v[k] = options_.noise * normal.Next();
      for (int64_t r = 0; r < kPoint; ++r) v[k] += map[k * kPoint + r] * z[r];
      squares += v[k] * v[k];
    }
    for (int64_t k = 0; k < d; ++k) *out++ = static_cast<float>(v[k] / std::sqrt(squares));
  }
}

void PlantedMol::FillItems(int64_t first, int64_t count, float* out) const {
  for (int64_t i = 0; i < count; ++i) {
    FillRow(item_maps_, kItems, first + i, out + i * config_.item_dim);
  }
}

void PlantedMol::FillQueries(int64_t first, int64_t count, float* out) const {
  for (int64_t i = 0; i < count; ++i) {
    FillRow(query_maps_, kQueries, first + i, out + i * config_.query_dim);
  }
}

absl::Status PlantedMol::WriteModel(const std::string& dir) const {
  return MakeMolCheckpoint(config_, dir, options_.seed, /*identity_projections=*/true);
}

}  // namespace trireme
