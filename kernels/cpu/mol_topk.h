// Streaming top-k over 64-bit keys, any k: a buffer that is cut back to the k largest when it is
// full (quickselect, so an insertion is O(1) on average). One thread's own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/mol_ops.h"

namespace trireme::cpu {

struct MolCandidate {
  uint64_t key;
  int32_t slot;
};

class MolTopKCollector {
 public:
  explicit MolTopKCollector(int64_t k)
      : k_(static_cast<size_t>(k)), full_(k_ + std::max<size_t>(4, k_ / 8)) {}

  // Keys at or below this are not among the k best.
  uint64_t threshold() const { return threshold_; }
  void RaiseThreshold(uint64_t key) { threshold_ = std::max(threshold_, key); }
  // True when the threshold was raised.
  bool Push(uint64_t key, int32_t slot) {
    if (key <= threshold_) return false;
    candidates_.push_back({key, slot});
    return candidates_.size() >= full_ && Cut();
  }
  // The k best of what was pushed, best first.
  std::vector<MolCandidate>& Finish() {
    if (candidates_.size() > k_) Cut();
    std::sort(candidates_.begin(), candidates_.end(), Before);
    return candidates_;
  }

 private:
  static bool Before(const MolCandidate& a, const MolCandidate& b) { return a.key > b.key; }
  bool Cut() {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end(),
                     Before);
    candidates_.resize(k_);
    const uint64_t before = threshold_;
    // The k-th itself stays: an equal key would be the same item.
    RaiseThreshold(candidates_.back().key);
    return threshold_ > before;
  }

  size_t k_, full_;
  uint64_t threshold_ = 0;
  std::vector<MolCandidate> candidates_;
};

}  // namespace trireme::cpu
