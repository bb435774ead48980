// Items, queries and heads for tests of retrieval: files as a user would bring them, and a
// generator of planted data on which approximate search can be judged.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "models/mol_config.h"

namespace trireme {

struct TestItems {
  int64_t dim = 0;
  std::vector<int64_t> ids;
  std::vector<float> embeddings;     // [n, dim]
  std::vector<uint64_t> attributes;  // [n], one word; empty: none
  std::vector<std::string> attribute_names;
  int64_t count() const { return static_cast<int64_t>(ids.size()); }
  void Append(int64_t id, const std::vector<float>& embedding, uint64_t attribute = 0);
};

// Uniform in [-1, 1), ids shuffled.
TestItems RandomItems(int64_t count, int64_t dim, uint64_t seed, bool attributes = false);
void WriteItems(const TestItems& items, const std::string& path);

struct TestTensor {
  std::string dtype;  // as safetensors spells it
  std::vector<int64_t> dims;
  std::string bytes;
};
void WriteTensors(const std::map<std::string, TestTensor>& tensors,
                  const std::map<std::string, std::string>& metadata, const std::string& path);

// Writes a head with random weights.
void WriteRandomHead(const MolConfig& config, const std::string& dir, uint64_t seed);
// A small one: 4x3 components of 8, D_q 12, D_x 10.
MolConfig SmallHead();

}  // namespace trireme
