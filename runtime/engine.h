// The front of one replica, on its leader rank: takes requests from any thread, plans steps, keeps
// them in flight on the replica's ranks, and hands out tokens and text. The other ranks sit in
// Worker::Run. runtime/README.md is the contract of a step.
//
// Three threads of its own. The engine thread plans, commits and makes text. The step thread sends
// plans and executes this rank's part; it is the only one that talks to other ranks. The delivery
// thread runs callbacks. With one pipeline stage a step is planned while the one before it is
// executed; the tokens it takes from that one are filled in by the ranks.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/delivery.h"
#include "runtime/metrics.h"
#include "runtime/scheduler.h"
#include "runtime/text_stream.h"
#include "runtime/worker.h"

namespace trireme {

struct EngineOptions {
  bool prefix_cache = true;  // compute equal beginnings of prompts once
  bool overlap = true;       // plan a step while the one before is executed (one pipeline stage)
  BatchPolicy policy = BatchPolicy::kContinuous;
  int64_t ageing_steps = 64;  // SchedulerOptions
  // Samples beyond max_num_seqs that may be open; 0 = no limit. A request counts with its n samples
  // until the last of them is over.
  int64_t max_queue = 0;
};

// The outputs of one request, for a caller that asks instead of being called. Any thread, one at a
// time. Destroying it does not end the request: Engine::Cancel does.
class OutputStream {
 public:
  // Waits. nullopt after the last output of the last sample.
  std::optional<TokenOutput> Next();
  // nullopt also when there is none yet.
  std::optional<TokenOutput> TryNext();

 private:
  friend class Engine;
  void Push(TokenOutput output, bool last);
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<TokenOutput> outputs_;
  bool ended_ = false;
};

class Engine {
 public:
  using Callback = Delivery::Callback;

  // Starts the engine's threads. `worker` must outlive the engine, which has it to itself;
  // `tokenizer` may be null: then there is no text. FailedPrecondition: this rank is not its
  // replica's leader, and calls Worker::Run. InvalidArgument names the option that is out of range.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(Worker& worker, const Tokenizer* tokenizer,
                                                        const EngineOptions& options = {});
  // Cancels what is unfinished, delivers that, and ends Worker::Run on the replica's other ranks.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // All of these: any thread, callbacks included, unless something else is said; none waits for a
  // step.

  // The callback runs on the delivery thread, once for every token of every sample; the output with
  // a finish reason is a sample's last. It should be quick, since it delays other callbacks; it may
  // call the engine. When it throws, its request ends, and Timeline tells why.
  // InvalidArgument: the request can never run; the line names the limit. AlreadyExists: a request
  // with this id is open. ResourceExhausted: overloaded, the queue is full. FailedPrecondition:
  // draining. Aborted: the engine has failed. Nothing happens then.
  absl::Status Submit(Request request, Callback callback);
  absl::StatusOr<std::shared_ptr<OutputStream>> Submit(Request request);
  // Ends a request soon; its samples get a last output. NotFound when it is not open.
  absl::Status Cancel(uint64_t request_id);
  // Waits until every open request is over and delivered. DeadlineExceeded: it takes longer than
  // `limit`. FailedPrecondition: called in a callback, which would wait for itself.
  absl::Status WaitIdle(std::chrono::microseconds limit = std::chrono::microseconds::max());
  // Takes no more requests. Does not wait; but nothing waits for company any more either.
  void Close();
  // Close, and waits as WaitIdle. What the engine failed with, if it did. FailedPrecondition:
  // called in a callback; nothing happens then.
  absl::Status Drain();

  EngineStats Stats() const;
  // Of the newest request with this id. NotFound when it is neither open nor among the last 1,024
  // that ended; of one that is open, only the id is known.
  absl::StatusOr<RequestTimeline> Timeline(uint64_t request_id) const;
  // The clock of Request::deadline_us.
  int64_t NowMicros() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Step {
    StepPlan plan;
    StepResult result;
    Clock::time_point planned, done;
    double execute_seconds = 0.0, communication_seconds = 0.0;  // on this rank
    GraphStats graphs;                                          // of all its steps so far
  };
  struct Submission {
    uint64_t serial = 0;  // counts what was accepted: an id may be used again
    Request request;
    std::shared_ptr<Delivery::Recipient> recipient{};  // one of the two
    std::shared_ptr<OutputStream> stream{};
  };
  struct Sample {
    TextStream text;
    int64_t last_token_us = -1;
    bool ended = false;
  };
  struct Open {
    Submission submission;
    std::vector<Sample> samples;
    int32_t left = 0;  // samples that have not ended
    RequestTimeline timeline;
    int64_t admitted_us = -1, first_token_us = -1;
    double execute_before = 0.0, communication_before = 0.0;  // the engine's, at admission
  };
  // Of one submission: by the time it is read, its id may be another's.
  struct Cancellation {
    uint64_t request_id, serial;
  };
  // What other threads left for the engine thread.
  struct Mail {
    std::vector<Submission> submissions;
    std::vector<Cancellation> cancels;
    std::vector<std::unique_ptr<Step>> done;
    bool drain = false, stop = false;
    void Clear() {  // keeps its memory
      submissions.clear();
      cancels.clear();
      done.clear();
      drain = stop = false;
    }
    bool empty() const {
      return submissions.empty() && cancels.empty() && done.empty() && !drain && !stop;
    }
  };

  Engine(Worker& worker, const Tokenizer* tokenizer, const EngineOptions& options);
  absl::Status CheckRequest(const Request& request) const;
  int64_t Room() const;
  absl::Status CheckRoom(int32_t samples) const;
  absl::Status Accept(Submission submission);
  // The engine thread; engine_loop.cc.
  void RunEngine();
  void TakeMail(Mail* mail);
  void Start(Submission submission);
  void CancelOpen(const Cancellation& cancel);
  void Take(std::unique_ptr<Step> step);
  void PlanSteps();
  void Fail(const absl::Status& status);
  void FailOpen();
  void Handle(const TokenEvent& event);
  void Emit(Open& open, TokenOutput output);
  RequestTimes TimesUntil(const Open& open, int64_t now_us) const;
  void Finish(uint64_t id);
  void CountSamples();
  void Publish();
  // The step thread.
  void RunSteps();
  absl::Status CheckMayWait() const;
  // The delivery thread, or the engine's.
  void Threw(uint64_t id, const std::string& what);
  void Over(uint64_t id);

  Worker& worker_;
  const Tokenizer* tokenizer_;
  const EngineOptions options_;
  const Clock::time_point begin_ = Clock::now();
  const int64_t depth_;  // steps planned and not committed

  // The engine thread's.
  Scheduler scheduler_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Open>> open_;
  std::vector<std::unique_ptr<Step>> spare_steps_;
  std::vector<TokenEvent> events_;
  std::vector<Delivery::Item> outbox_;
  // Of requests that are pulled: handed out when the counters tell of their end.
  std::vector<std::pair<std::shared_ptr<OutputStream>, TokenOutput>> last_outputs_;
  EngineStats stats_;
  int64_t steps_out_ = 0;
  int64_t samples_ = 0;                 // waiting and running
  Clock::time_point counted_ = begin_;  // then
  Clock::time_point last_commit_ = Clock::now();

  // Shared; the lock is held to hand something over, never during a step.
  mutable std::mutex mutex_;
  std::condition_variable mail_arrived_, plan_arrived_, idle_;
  Mail mail_;
  std::vector<std::unique_ptr<Step>> planned_;  // as many as may be in flight, at most
  std::atomic<int64_t> planned_count_ = 0;      // of planned_, to look without the lock
  bool draining_ = false, stop_steps_ = false;
  absl::Status failure_;
  // By id; open until the last output is delivered.
  struct OpenRequest {
    uint64_t serial = 0;  // of the submission: a later one may have the same id
    int32_t samples = 0;
  };
  absl::flat_hash_map<uint64_t, OpenRequest> not_over_;
  int64_t open_samples_ = 0;
  absl::flat_hash_map<uint64_t, std::string> thrown_;
  struct Ended {
    uint64_t serial = 0;
    RequestTimeline timeline;
  };
  std::deque<Ended> ended_;  // the last that did
  EngineStats published_;
  int64_t accepted_ = 0, refused_ = 0, overloaded_ = 0, callback_errors_ = 0;

  std::unique_ptr<Delivery> delivery_;
  std::thread step_thread_, engine_thread_;
};

}  // namespace trireme
