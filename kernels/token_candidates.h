// Candidates of a row on the host: their order, and the draw among them. What the CPU's
// ChooseTokens and runtime/sampler, which takes lists of any length, have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/philox.h"

namespace trireme {

struct TokenCandidate {
  float score = 0.0f;  // after penalties, before temperature
  float raw = 0.0f;    // the model's logit
  int32_t id = -1;     // -1 = no such candidate (the shard has fewer tokens)
};

// Total order: higher score first, then the smaller id.
inline bool Before(const TokenCandidate& a, const TokenCandidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// Sorts what shards sent. The result: how many are surely the whole vocabulary's best, where all
// that was not sent comes after `bound`.
inline int64_t SortCandidates(std::vector<TokenCandidate>& candidates,
                              const TokenCandidate& bound) {
  std::sort(candidates.begin(), candidates.end(), Before);
  return std::upper_bound(candidates.begin(), candidates.end(), bound, Before) - candidates.begin();
}
// A bound after everything: nothing is left out.
inline constexpr TokenCandidate kAfterAll{-std::numeric_limits<float>::infinity(), 0.0f,
                                          std::numeric_limits<int32_t>::max()};

// The one with the largest noisy score, on a tie the smaller id; id -1: there are none.
inline TokenCandidate DrawAmong(std::span<const TokenCandidate> candidates,
                                double inverse_temperature, uint64_t seed, uint64_t position) {
  TokenCandidate chosen;
  double chosen_key = 0.0;
  for (const TokenCandidate& candidate : candidates) {
    const double key = static_cast<double>(candidate.score) * inverse_temperature +
                       GumbelNoise(seed, position, static_cast<uint32_t>(candidate.id));
    if (chosen.id >= 0 && (key < chosen_key || (key == chosen_key && candidate.id > chosen.id)))
      continue;
    chosen = candidate;
    chosen_key = key;
  }
  return chosen;
}

}  // namespace trireme
