// What a caller asks for and what comes back. Plain data.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace trireme {

using TokenId = int32_t;

inline constexpr int32_t kMaxLogprobs = 100;

// Names and meanings follow vLLM's and Hugging Face's sampling parameters. The order of application
// is: repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p.
struct SamplingParams {
  float temperature = 0.0f;  // 0 = greedy: the most likely token, the smaller id on a tie
  int32_t top_k = 0;         // keep the k most likely; 0 = all
  float top_p = 1.0f;        // keep the smallest set with at least this probability; 1 = all
  float min_p = 0.0f;        // keep tokens at least min_p as likely as the most likely one; 0 = all
  float repetition_penalty = 1.0f;  // > 1 discourages tokens of prompt and output; 1 = off
  float presence_penalty = 0.0f;    // subtracted once from tokens of the output
  float frequency_penalty = 0.0f;   // subtracted per occurrence in the output
  uint64_t seed = 0;                // same seed, same request: same tokens, in any batch and layout
  int32_t logprobs = -1;  // -1 = none; 0 to kMaxLogprobs: of the chosen and the n likeliest tokens

  bool HasPenalties() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};
// InvalidArgument names the first parameter that is out of range, and the range.
absl::Status CheckSamplingParams(const SamplingParams& params);

struct Request {
  uint64_t id = 0;
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  int64_t max_tokens = 16;  // of output
  std::vector<TokenId>
      stop_tokens;  // end the output and are not part of its text (the model's EOS, unless ignored)
  std::vector<std::string> stop;  // end the output and are cut from its text
  int32_t n = 1;                  // samples of the prompt; the i-th draws with seed + i
  int32_t priority = 0;  // the higher one runs first; who waits catches up (SchedulerOptions)
  // In the clock of Scheduler::AdvanceTime, microseconds.
  int64_t arrival_us = 0;
  int64_t deadline_us = 0;  // ended then, whatever is done; 0 = none
  // Output of a run that was cut short: it is computed again like a prompt, and the next token
  // follows it as if nothing had happened.
  std::vector<TokenId> output{};
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kDeadline, kError };
inline constexpr int kFinishReasons = 6;
const char* Name(FinishReason reason);

// A sampled token. Log-probabilities are those of the model itself: before penalties, temperature
// and filters.
struct SampledToken {
  TokenId token = -1;
  float logprob = 0.0f;                        // meaningful when asked for
  std::vector<std::pair<TokenId, float>> top;  // the n most likely, best first
};

}  // namespace trireme
