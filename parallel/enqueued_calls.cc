#include "parallel/enqueued_calls.h"

#include <utility>

namespace trireme {

EnqueuedCalls::Mark EnqueuedCalls::TakeSpare() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (spare_.empty()) return nullptr;
  const Mark mark = spare_.back();
  spare_.pop_back();
  return mark;
}

void EnqueuedCalls::Add(FlightRecorder& recorder, const CommCall& call, Mark begin, Mark end) {
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back({&recorder, call, begin, end});
}

void EnqueuedCalls::Look() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!queue_.empty()) {
    Entry& oldest = queue_.front();
    if (!oldest.entered) {
      if (!passed_(oldest.begin)) return;
      oldest.open = oldest.recorder->Enter(oldest.call);
      oldest.entered = true;
    }
    if (!passed_(oldest.end)) return;
    oldest.recorder->Complete(oldest.open);
    spare_.insert(spare_.end(), {oldest.begin, oldest.end});
    queue_.pop_front();
  }
}

std::vector<EnqueuedCalls::Mark> EnqueuedCalls::TakeAll() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Entry& entry : queue_) spare_.insert(spare_.end(), {entry.begin, entry.end});
  queue_.clear();
  return std::exchange(spare_, {});
}

}  // namespace trireme
