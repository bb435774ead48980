// What the MoL hot loops (mol-inl.h) are given: one block of 32 items against one query. Part of
// isa.h's contract: plain data only.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace trireme::cpu {

inline constexpr int64_t kMolLanes = 32;  // kMolBlockRows
// Outputs of a gate layer that are computed together; their weights lie side by side.
inline constexpr int64_t kMolGateTile = 8;

enum class MolElement : uint8_t { kF32, kBF16, kInt8 };

struct MolLogitsArgs {
  const void* components = nullptr;  // [Px, d, 32]
  const BF16* scales = nullptr;      // [Px, 32], of kInt8
  MolElement element = MolElement::kF32;
  const float* query = nullptr;  // [Pq, d]
  int64_t query_components = 0, item_components = 0, dim = 0;
  bool diagonal = false;
  float inverse_temperature = 1.0f;
  float floor = 0;          // lanes whose largest logit is below it are pruned
  float* logits = nullptr;  // out: [L, 32]
};

// A gate layer's weights: [outputs / 8][inputs][8], filled up with zeros; bias [outputs, rounded up
// to 8].
struct MolGateLayer {
  const float* weights = nullptr;
  const float* bias = nullptr;
  int64_t inputs = 0, outputs = 0;
};

struct MolGateArgs {
  const float* logits = nullptr;    // [L, 32]
  const void* item_gate = nullptr;  // [G, 32]
  MolElement item_gate_element = MolElement::kF32;
  const BF16* item_gate_scales = nullptr;  // [32], of kInt8
  const float* query_gate = nullptr;       // [G]
  MolGateLayer hidden, output;             // hidden.outputs 0: output works on the logits
  bool concat = false;                     // kConcatRelu
  float* scratch = nullptr;                // MolGateScratchFloats(L, H)
  float* scores = nullptr;                 // out: [32]
};

inline int64_t MolGateScratchFloats(int64_t logits, int64_t hidden) {
  return (logits + hidden + 2 * kMolGateTile) * kMolLanes;
}

// One vector of every lane against one query vector, for first stages.
struct MolDotArgs {
  const void* vectors = nullptr;  // [d, 32]
  const BF16* scales = nullptr;   // [32], of kInt8
  MolElement element = MolElement::kF32;
  const float* query = nullptr;  // [d]
  int64_t dim = 0;
  float* sums = nullptr;  // [32], added to
};

}  // namespace trireme::cpu
