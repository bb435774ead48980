#include "parallel/nccl/nccl_comm.h"

#include <chrono>
#include <thread>

namespace trireme {
namespace {

// Calls enqueue and return after microseconds; one that takes longer waits inside of NCCL, for a
// peer to connect or to enter.
constexpr int kCallMs = 100;

}  // namespace

void NcclComm::Keep(const absl::Status& status) {
  const std::lock_guard<std::mutex> lock(fault_mutex_);
  if (fault_.ok()) fault_ = status;
}

absl::Status NcclComm::Poll() {
  // Somebody who is at it already, or aborts it, is not waited for.
  if (std::unique_lock<std::mutex> life(life_, std::try_to_lock);
      life.owns_lock() && !aborted_.load()) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = nccl_.CommGetAsyncError(comm_, &state);
    Keep(NcclStatus(nccl_, asked != ncclSuccess ? asked : state, "asynchronous error"));
  }
  const std::lock_guard<std::mutex> lock(fault_mutex_);
  return fault_;
}

void NcclComm::Abort() {
  const std::lock_guard<std::mutex> life(life_);
  if (aborted_.exchange(true)) return;
  Keep(absl::AbortedError("NCCL: aborted, since the job has failed"));
  // No new call begins. NCCL lets another thread abort a communicator that a call waits in, but one
  // that is on its way there must not find it gone.
  std::unique_lock<std::mutex> calling(calling_, std::defer_lock);
  for (int ms = 0; ms < kCallMs && !calling.try_lock(); ++ms)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  nccl_.CommAbort(comm_);
}

}  // namespace trireme
