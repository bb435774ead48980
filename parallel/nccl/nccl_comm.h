// One ncclComm_t: a thread makes calls with it, and another may look at it and abort it meanwhile,
// also while a call waits inside NCCL.
#pragma once

#include <nccl.h>

#include <atomic>
#include <mutex>

#include "absl/status/status.h"
#include "parallel/nccl/nccl_api.h"

namespace trireme {

class NcclComm {
 public:
  // Owns `comm`.
  NcclComm(const NcclApi& nccl, ncclComm_t comm) : nccl_(nccl), comm_(comm) {}
  ~NcclComm() {
    if (!aborted_.load()) nccl_.CommDestroy(comm_);
  }
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  // One thread. call(ncclComm_t) -> ncclResult_t; not made any more once aborted. A fault is kept.
  template <typename Call>
  void Do(const char* what, Call&& call) {
    const std::lock_guard<std::mutex> lock(calling_);
    if (!aborted_.load()) Keep(NcclStatus(nccl_, call(comm_), what));
  }

  // --- Any thread. ---
  // The first fault, of a call or asynchronous; OK while there is none. Does not wait.
  absl::Status Poll();
  // What waits in the communicator's calls or kernels comes to an end; so does the communicator.
  void Abort();

 private:
  void Keep(const absl::Status& status);

  const NcclApi& nccl_;
  const ncclComm_t comm_;
  std::atomic<bool> aborted_{false};
  std::mutex calling_;  // held while a call is made
  std::mutex life_;  // held while NCCL uses or frees comm_ for another thread than the calling one
  std::mutex fault_mutex_;
  absl::Status fault_;
};

}  // namespace trireme
