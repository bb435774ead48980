// Which steps are replayed, and the sizes they are padded to. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/step.h"

namespace trireme {

// Sequences that a decode step may be padded to: 1, 2, 4, 8, from there by eights to 128, then by
// an eighth of the power of two below; the last is `largest` itself. Ascending. REQUIRES: largest
// >= 1.
std::vector<int64_t> DecodeBuckets(int64_t largest);
// The smallest of them that holds so many; 0 where none does.
int64_t BucketOf(std::span<const int64_t> buckets, int64_t sequences);

// One token of each sequence, all of them sampled for: what is captured. A step with more tokens of
// one, or one whose logits are returned, is a prompt's.
bool IsDecodeStep(const StepPlan& plan);

}  // namespace trireme
