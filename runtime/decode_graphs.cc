#include "runtime/decode_graphs.h"

#include <algorithm>
#include <bit>

#include "kernels/check.h"

namespace trireme {

std::vector<int64_t> DecodeBuckets(int64_t largest) {
  CHECK_GE(largest, 1);
  std::vector<int64_t> buckets;
  for (int64_t size = 1; size < largest;) {
    buckets.push_back(size);
    const auto power = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(size)));
    size += size < 8 ? size : std::max<int64_t>(8, power / 8);
  }
  buckets.push_back(largest);
  return buckets;
}

int64_t BucketOf(std::span<const int64_t> buckets, int64_t sequences) {
  const auto bucket = std::lower_bound(buckets.begin(), buckets.end(), sequences);
  return bucket == buckets.end() ? 0 : *bucket;
}

bool IsDecodeStep(const StepPlan& plan) {
  return !plan.chunks.empty() &&
         std::all_of(plan.chunks.begin(), plan.chunks.end(), [](const Chunk& chunk) {
           return chunk.num_tokens == 1 && chunk.logit_rows == LogitRows::kLast;
         });
}

}  // namespace trireme
