#include "kernels/trace.h"

#include <algorithm>
#include <memory>
#include <mutex>

namespace trireme {
namespace trace_internal {

std::atomic<bool> g_tracing = false;

namespace {

// A thread writes its own ring; the lock is there for the one who takes it.
struct Ring {
  std::mutex mutex;
  std::vector<TraceSpan> spans;
  size_t next = 0;
  bool full = false;
};
std::mutex g_mutex;
std::vector<std::shared_ptr<Ring>> g_rings;  // of threads that have ended, too
size_t g_capacity = 0;

Ring& OwnRing() {
  thread_local const std::shared_ptr<Ring> ring = [] {
    auto made = std::make_shared<Ring>();
    const std::lock_guard lock(g_mutex);
    g_rings.push_back(made);
    return made;
  }();
  return *ring;
}

}  // namespace

void Leave(const char* name, int64_t argument, int64_t begin_ns) {
  const int64_t end_ns = TraceNow();
  Ring& ring = OwnRing();
  const std::lock_guard lock(ring.mutex);
  if (ring.spans.empty()) {
    const std::lock_guard capacity(g_mutex);
    ring.spans.resize(g_capacity);
  }
  if (ring.spans.empty()) return;
  ring.spans[ring.next] = {name, 0, argument, begin_ns, end_ns};
  if (++ring.next == ring.spans.size()) ring.next = 0, ring.full = true;
}

}  // namespace trace_internal

int64_t TraceNow() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void StartTrace(int64_t spans) {
  {
    const std::lock_guard lock(trace_internal::g_mutex);
    trace_internal::g_capacity = static_cast<size_t>(spans);
  }
  trace_internal::g_tracing = true;
}

std::vector<TraceSpan> TakeTrace() {
  using namespace trace_internal;
  g_tracing = false;
  std::vector<std::shared_ptr<Ring>> rings;
  {
    const std::lock_guard lock(g_mutex);
    rings = g_rings;
  }
  std::vector<TraceSpan> out;
  for (size_t thread = 0; thread < rings.size(); ++thread) {
    Ring& ring = *rings[thread];
    const std::lock_guard lock(ring.mutex);
    const size_t begin = out.size();
    const auto next = ring.spans.begin() + static_cast<int64_t>(ring.next);
    if (ring.full) out.insert(out.end(), next, ring.spans.end());
    out.insert(out.end(), ring.spans.begin(), next);
    for (size_t i = begin; i < out.size(); ++i) out[i].thread = static_cast<int32_t>(thread);
    ring.spans.clear();
    ring.next = 0;
    ring.full = false;
  }
  return out;
}

}  // namespace trireme
