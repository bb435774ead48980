// Flight records of calls that are enqueued on a stream: a call is entered when the stream has come
// to it and completed when the stream has passed it, not when the host has enqueued it. Between the
// two the rank waits for others, as far as the failure detector can see, and before it computes.
// Both are noticed when somebody looks: at the end of every Synchronize, with every beat of the
// failure detector.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "parallel/flight_recorder.h"

namespace trireme {

// The calls of one stream.
class EnqueuedCalls {
 public:
  // A point of the stream, as its device knows it (cudaEvent_t); owned by who uses this class.
  using Mark = void*;
  // `passed`: is the stream past a mark? Any thread.
  explicit EnqueuedCalls(std::function<bool(Mark)> passed) : passed_(std::move(passed)) {}
  EnqueuedCalls(const EnqueuedCalls&) = delete;
  EnqueuedCalls& operator=(const EnqueuedCalls&) = delete;

  // --- The thread that enqueues. ---
  // A mark that is not needed any more; null: make one.
  Mark TakeSpare();
  // The stream does the call between the two marks, after all calls added before.
  void Add(FlightRecorder& recorder, const CommCall& call, Mark begin, Mark end);

  // --- Any thread. ---
  void Look();
  // All marks. Calls that are under way stay so in the records.
  std::vector<Mark> TakeAll();

 private:
  struct Entry {
    FlightRecorder* recorder;
    CommCall call;
    Mark begin, end;
    bool entered = false;
    FlightRecorder::OpenCall open{};
  };
  const std::function<bool(Mark)> passed_;
  std::mutex mutex_;  // of what follows
  std::deque<Entry> queue_;
  std::vector<Mark> spare_;
};

}  // namespace trireme
