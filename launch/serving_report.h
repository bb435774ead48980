// What `trireme bench serving` makes of the requests it has served.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace trireme {

// A request as its caller saw it, seconds since the run began.
struct ServedRequest {
  double submitted = 0.0;
  std::vector<double> tokens;  // when each came
};

// Milliseconds, as vLLM's benchmarks define them.
struct ServingLatencies {
  std::vector<double> first_token;  // TTFT, of each request
  std::vector<double> inter_token;  // ITL: each gap between two tokens of a request
  // TPOT, of each request with two tokens or more: the mean of its gaps. A stall of one token in
  // many is all but lost in it, and is seen in inter_token.
  std::vector<double> time_per_output_token;
  int64_t requests = 0, tokens = 0;
  int64_t good = 0;           // requests within both limits
  double stay_seconds = 0.0;  // of all requests together
};
// A request without tokens, refused, counts for nothing. The limits are those of the goodput: of
// the first token, and of the time per output token, which is 0 for a single token.
ServingLatencies Measure(std::span<const ServedRequest> served, double slo_first_token_ms,
                         double slo_time_per_output_token_ms);

// The mean number of requests in a system is the rate at which they come times the mean time they
// stay (Little, 1961): L = lambda W. Two counts of one run that know nothing of each other; where
// they differ, one of them is wrong.
struct LittlesLaw {
  static constexpr double kTolerance = 0.05;
  double in_system = 0.0;        // L, requests
  double rate_times_stay = 0.0;  // lambda W, requests

  double difference() const;  // relative to the larger one
  bool holds() const { return difference() <= kTolerance; }
  std::string Describe() const;  // a line for when it does not
};

}  // namespace trireme
