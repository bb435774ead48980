#include "launch/serving_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace trireme {

ServingLatencies Measure(std::span<const ServedRequest> served, double slo_first_token_ms,
                         double slo_time_per_output_token_ms) {
  ServingLatencies out;
  for (const ServedRequest& request : served) {
    const std::vector<double>& tokens = request.tokens;
    if (tokens.empty()) continue;
    ++out.requests;
    out.tokens += static_cast<int64_t>(tokens.size());
    out.stay_seconds += tokens.back() - request.submitted;
    out.first_token.push_back(1e3 * (tokens.front() - request.submitted));
    for (size_t i = 1; i < tokens.size(); ++i)
      out.inter_token.push_back(1e3 * (tokens[i] - tokens[i - 1]));
    double per_token = 0.0;
    if (tokens.size() > 1) {
      per_token = 1e3 * (tokens.back() - tokens.front()) / static_cast<double>(tokens.size() - 1);
      out.time_per_output_token.push_back(per_token);
    }
    out.good +=
        out.first_token.back() <= slo_first_token_ms && per_token <= slo_time_per_output_token_ms;
  }
  return out;
}

double LittlesLaw::difference() const {
  const double larger = std::max(in_system, rate_times_stay);
  return larger > 0.0 ? std::abs(in_system - rate_times_stay) / larger : 0.0;
}

std::string LittlesLaw::Describe() const {
  return absl::StrFormat(
      "Little's law does not hold: the scheduler has counted %.3g requests in the mean, and by "
      "their rate and stay there were %.3g, a difference of %.1f%%; do not trust these figures",
      in_system, rate_times_stay, 100.0 * difference());
}

}  // namespace trireme
