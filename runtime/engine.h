// The front of one replica, on its leader rank: takes requests, drives the scheduler, sends every
// plan to the replica's other ranks, keeps as many micro-batches in flight as there are stages, and
// turns tokens into text. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/scheduler.h"
#include "runtime/text_stream.h"
#include "runtime/worker.h"

namespace trireme {

// What a request's callback gets for every token.
struct TokenOutput {
  uint64_t request_id = 0;
  SampledToken sampled{};
  std::string text{};  // text that became final with this token; may be empty
  FinishReason finish = FinishReason::kNone;
};

struct EngineStats {
  int64_t steps = 0;
  int64_t prefill_tokens = 0,
          decode_tokens = 0;  // prompt tokens computed; tokens sampled after the first of a request
  double prefill_seconds = 0.0;  // time in which the oldest step in flight held prompt tokens
  double decode_seconds = 0.0;   // time in which it did not
};

class Engine {
 public:
  using Callback = std::function<void(const TokenOutput&)>;

  // `worker` must be the leader's and outlive the engine; `tokenizer` may be null.
  Engine(Worker& worker, const Tokenizer* tokenizer);
  // Sends the stop plan to the other ranks of the replica, whatever is unfinished.
  ~Engine();

  // InvalidArgument / AlreadyExists as Scheduler::Add. The callback runs in Step(), on the caller's
  // thread.
  absl::Status Submit(Request request, Callback callback);
  absl::Status Cancel(uint64_t request_id);
  // Advances by one micro-batch. False when there is nothing left to do. DataLoss when the model
  // gives no number to choose a token by; the engine is then of no further use.
  absl::StatusOr<bool> Step();
  const EngineStats& stats() const { return stats_; }

  // Logits of every position of `tokens` [T], one row at a time, in order: row(position, logits
  // [V]). Only while no request is running. InvalidArgument when the sequence does not fit.
  absl::Status Evaluate(const std::vector<TokenId>& tokens,
                        const std::function<void(int64_t, std::span<const float>)>& row);

 private:
  using Clock = std::chrono::steady_clock;
  struct InFlight {
    StepPlan plan;
    std::optional<StepResult> result;  // already here when this rank is the last stage
  };
  struct Running {
    TextStream text;
    Callback callback;
    bool first_token_seen = false;
  };
  void Dispatch(StepPlan plan);
  struct FinishedStep {
    StepPlan plan;
    StepResult result;
  };
  FinishedStep TakeOldest();
  void Deliver(const TokenEvent& event);

  Worker& worker_;
  const Tokenizer* tokenizer_;
  Scheduler scheduler_;
  int64_t depth_;           // micro-batches in flight
  std::vector<int> peers_;  // the replica's other ranks
  std::deque<InFlight> in_flight_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Running>> running_;
  EngineStats stats_;
  Clock::time_point last_commit_;
};

}  // namespace trireme
