// One sample of one request, as the scheduler knows it. Part of scheduler.cc and schedule_plan.cc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "runtime/prefix_cache.h"
#include "runtime/request.h"

namespace trireme {

// A step looks at every running sequence, and a thousand of them do not stay in the nearest cache:
// what an ordinary decode reads and writes lies in the first three cache lines, and a loop over
// sequences fetches those of the next ones ahead.
struct alignas(64) Sequence {
  // kEnding: its last step is in flight, and its slot and pages are others' already.
  enum class State : uint8_t { kUnused, kWaiting, kRunning, kEnding };

  uint64_t number = 0;  // counts sequences, so that an old pointer can be told from a new use
  State state = State::kUnused;
  bool admitted_before = false;
  bool shares_last_page = false;  // until its first chunk, which copies that page
  bool prompt_planned = false;    // by the plan `prompt_step`
  int32_t slot = -1;
  int64_t scheduled = 0;  // tokens that are computed or in flight
  int64_t unsampled = 0;  // steps in flight that sample its next tokens
  int64_t prompt_tokens = 0;
  int64_t max_length = 0;       // of tokens
  int64_t planned_step = -1;    // the last plan it is part of
  uint64_t stop_mask = 0;       // bit t % 64 of every stop token t
  std::vector<TokenId> tokens;  // prompt and committed output
  std::vector<int32_t> pages;   // -1: given back, since no later token looks at it
  // Its first `cached_pages` pages are known to the prefix cache, up to this entry.
  int64_t cached_pages = 0;
  PrefixCache::Entry cached_entry = PrefixCache::kStart;
  uint64_t request_id = 0;
  int32_t sample = 0;
  TokenId last_token = -1;  // of `tokens`
  int64_t lost_tokens = 0;  // leading ones computed already when it was preempted last

  int64_t prompt_step = -1;   // the plan that completes the prompt
  int64_t dropped_pages = 0;  // leading ones given back
  // Arrival in steps, made earlier by priority: the smaller one goes first, and is preempted last.
  // It never changes, so who waits is overtaken for a bounded number of steps.
  int64_t virtual_arrival = 0;
  Sequence* parent = nullptr;  // whose prompt's pages this sample may share
  uint64_t parent_number = 0;
  Request request;  // its prompt is moved to `tokens`

  std::tuple<int64_t, uint64_t> Key() const { return {virtual_arrival, number}; }
  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  bool in_output() const { return length() + unsampled > prompt_tokens; }
  bool Stops(TokenId token) const {
    return (stop_mask >> (token & 63) & 1) != 0 &&
           std::find(request.stop_tokens.begin(), request.stop_tokens.end(), token) !=
               request.stop_tokens.end();
  }
  void Append(TokenId token) {
    tokens.push_back(token);
    last_token = token;
  }
  bool running() const { return state == State::kRunning; }
  // `lookahead`: samples that may be in flight when the next token is planned.
  bool ReadyToDecode(int64_t lookahead) const {
    return running() && in_output() && unsampled <= lookahead &&
           scheduled + 1 == length() + unsampled && length() + unsampled < max_length;
  }
  bool AllPlanned() const { return length() + unsampled == max_length; }
  bool ReadyToPrefill() const {
    return running() && unsampled == 0 && scheduled < length() && !ReadyToDecode(0);
  }
};

// Sequences that a loop fetches ahead: the memory answers within the time of a few.
inline constexpr size_t kFetchAhead = 8;
inline void Fetch(const Sequence* sequence) {
  for (int line = 0; line < 3; ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(sequence) + 64 * line, /*rw=*/1);
}

// The place of the next token.
inline void FetchEnd(const std::vector<TokenId>& tokens) {
  __builtin_prefetch(tokens.data() + tokens.size(), /*rw=*/1);
}

}  // namespace trireme
