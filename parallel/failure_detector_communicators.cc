// A failure detector's watch over this rank's communicators; see failure_detector.h.
#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "parallel/communicator.h"
#include "parallel/failure_detector_impl.h"

namespace trireme {
namespace {

constexpr int64_t kMs = 1'000'000;

// Mostly a communicator's error is what is left of a rank that died or a host that was lost: these
// get the time to be found out, and are the failure then.
constexpr int64_t kConsequenceNs = 500 * kMs;
constexpr int64_t kAbortNs = 500 * kMs;  // for communicators to be aborted

}  // namespace

void FailureDetector::Impl::PollCommunicators() {
  std::string error;
  int64_t error_ns = 0;
  std::unique_lock<std::mutex> lock(communicators_mutex);
  while (!stop.load() && !failed.load()) {
    for (Communicator* const communicator : communicators) {
      const absl::Status status = communicator->Poll();
      if (status.ok() || !error.empty()) continue;
      error = absl::StrCat("communicator ", Describe(communicator->group()), ": ",
                           std::string(status.message()));
      error_ns = MonotonicNs();
    }
    if (!error.empty() && MonotonicNs() - error_ns >= std::min(kConsequenceNs, timeout_ns)) {
      SetFatalError(error);
      return Wake();
    }
    communicators_wake.wait_for(lock, std::chrono::nanoseconds(beat_ns));
  }
}

void FailureDetector::Impl::AbortCommunicators() {
  RunAtMost(kAbortNs, [this] {
    const std::lock_guard<std::mutex> lock(communicators_mutex);
    for (Communicator* const communicator : communicators) communicator->Abort();
  });
}

void FailureDetector::Impl::StopPolling() {
  {
    const std::lock_guard<std::mutex> lock(communicators_mutex);
    communicators_wake.notify_all();
  }
  if (poller.joinable()) poller.join();
}

void FailureDetector::AddCommunicator(Communicator* communicator) {
  const std::lock_guard<std::mutex> lock(impl_->communicators_mutex);
  impl_->communicators.push_back(communicator);
  if (!impl_->poller.joinable())
    impl_->poller = Impl::StartThread([state = impl_.get()] { state->PollCommunicators(); });
}

void FailureDetector::RemoveCommunicator(Communicator* communicator) {
  const std::lock_guard<std::mutex> lock(impl_->communicators_mutex);
  std::erase(impl_->communicators, communicator);
}

}  // namespace trireme
