// What a process did when: named spans of time in a ring per thread, for a Chrome trace. Off unless
// StartTrace was called: a span then costs one branch. Any thread may leave spans; StartTrace and
// TakeTrace belong to one thread and to times when no span is open elsewhere.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace trireme {

struct TraceSpan {
  const char* name;  // a string literal
  int32_t thread;    // counts the threads that left spans
  int64_t argument;  // what the span is about, e.g. a step; -1 = nothing
  int64_t begin_ns;  // steady clock
  int64_t end_ns;
};

// The last `spans` of each thread are kept.
void StartTrace(int64_t spans = 1 << 18);
// All spans so far, by thread and time; the trace is off again.
std::vector<TraceSpan> TakeTrace();
int64_t TraceNow();

namespace trace_internal {
extern std::atomic<bool> g_tracing;
void Leave(const char* name, int64_t argument, int64_t begin_ns);
}  // namespace trace_internal

// Lives as long as what it names.
class TraceScope {
 public:
  explicit TraceScope(const char* name, int64_t argument = -1)
      : name_(trace_internal::g_tracing.load(std::memory_order_relaxed) ? name : nullptr),
        argument_(argument),
        begin_ns_(name_ != nullptr ? TraceNow() : 0) {}
  ~TraceScope() {
    if (name_ != nullptr) trace_internal::Leave(name_, argument_, begin_ns_);
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  const char* name_;
  int64_t argument_;
  int64_t begin_ns_;
};

}  // namespace trireme
