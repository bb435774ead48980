// The golden logits of a checkpoint: what an independent float64 implementation computes for a few
// prompts (tests/golden/README.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace trireme {

struct GoldenLogits {
  std::string name;
  std::vector<int32_t> ids;   // [T]
  std::vector<float> logits;  // [T, V]
};
// Of DIR/golden/logits.safetensors.
std::vector<GoldenLogits> ReadGoldenLogits(const std::string& dir);

}  // namespace trireme
