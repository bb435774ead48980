// Recorded arrivals, which `trireme bench serving --arrivals` replays: when each request came, and
// how long it was. Rank 0's work.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace trireme {

struct RecordedArrival {
  double at = 0.0;  // seconds since the run began
  int64_t prompt_tokens = 0;
  int64_t max_tokens = 0;  // of output
};

// JSON lines such as {"at": 0.25, "prompt_tokens": 120, "max_tokens": 64}, in order of "at"; empty
// lines count for nothing. An error names the file and the line: a key that is missing, unknown or
// out of range, a line before its predecessor, a request of more than `max_model_len` tokens.
absl::StatusOr<std::vector<RecordedArrival>> ReadArrivals(const std::string& path,
                                                          int64_t max_model_len);

}  // namespace trireme
