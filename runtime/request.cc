#include "runtime/request.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace trireme {
namespace {
absl::Status OutOfRange(const char* name, double value, const std::string& range) {
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; it must be ", range));
}
}  // namespace

absl::Status CheckSamplingParams(const SamplingParams& p) {
  if (!(p.temperature >= 0.0f) || !std::isfinite(p.temperature))
    return OutOfRange("temperature", p.temperature, "0 (greedy) or more");
  if (p.top_k < 0) return OutOfRange("top-k", p.top_k, "0 (all tokens) or more");
  if (!(p.top_p > 0.0f && p.top_p <= 1.0f))
    return OutOfRange("top-p", p.top_p, "above 0 and at most 1");
  if (!(p.min_p >= 0.0f && p.min_p <= 1.0f)) return OutOfRange("min-p", p.min_p, "between 0 and 1");
  if (!(p.repetition_penalty > 0.0f) || !std::isfinite(p.repetition_penalty)) {
    return OutOfRange("repetition-penalty", p.repetition_penalty, "above 0 (1 = off)");
  }
  if (!(std::abs(p.presence_penalty) <= 2.0f))
    return OutOfRange("presence-penalty", p.presence_penalty, "between -2 and 2");
  if (!(std::abs(p.frequency_penalty) <= 2.0f))
    return OutOfRange("frequency-penalty", p.frequency_penalty, "between -2 and 2");
  if (p.logprobs < -1 || p.logprobs > kMaxLogprobs)
    return OutOfRange("logprobs", p.logprobs,
                      absl::StrCat("between 0 and ", kMaxLogprobs, " (-1 = none)"));
  return absl::OkStatus();
}

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kError:
      return "error";
  }
  return "?";
}

}  // namespace trireme
