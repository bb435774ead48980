// Which way a sum over ranks takes, from what each way took when it was measured at start-up. Pure
// arithmetic, without CUDA.
#pragma once

#include <cstdint>
#include <span>

namespace trireme {

// Seconds of one sum of `bytes`, on the slowest rank; infinite where the way cannot take it.
struct SumTimes {
  int64_t bytes = 0;
  double one_shot = 0, two_shot = 0, nccl = 0;
};

// Sums of at most so many bytes go one-shot, else of at most so many two-shot, else through NCCL.
// The bits are the same on all three ways.
struct SumLimits {
  int64_t one_shot = 0, two_shot = 0;
  bool operator==(const SumLimits&) const = default;
};

// `times` by ascending bytes. A limit is the last size up to which the way, at each size measured
// that it would take, was no slower than those after it: what lies between two sizes goes the way
// of the larger.
SumLimits CrossoverOf(std::span<const SumTimes> times);

}  // namespace trireme
