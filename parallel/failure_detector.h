// Notices that a rank of the job has failed and ends the job in bounded time, saying which rank, on
// which host, in which phase, step and call. Every rank runs one, on a thread of its own, over TCP
// connections of its own: neither waits for MPI, which may be what is stuck.
//
// Noticed are: a process that died (its connection closes: at once), one that is stopped or whose
// host is lost (no beat for timeout_s), one that others wait for and that makes no progress for
// timeout_s (no call or step completed and no CPU time, page fault or disk access of its main
// thread: a long prefill is no failure), ranks that wait for each other, an error that one rank
// alone has, an asynchronous error of a communicator, a failed CHECK, and the death of mpirun or
// whatever else started the ranks. A launcher that is stopped is no failure: rank 0 says so once.
//
// Then, in tiers, each of which needs less than the one before: (1) every rank's JobStatus() says
// so, which stops a rank that can still look at it; hooks run, which fail the requests in flight;
// the lowest surviving rank prints one block for the job; the flight records are written to files;
// (2) communicators are aborted, which brings threads and devices out of calls that can be; (3)
// ranks that are frozen are killed by a survivor on their host; (4) where somebody is still left,
// MPI_Abort; (5) _exit from this thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

class Communicator;
class ControlPlane;
class FlightRecorder;

struct FailureDetectorOptions {
  double timeout_s = 5.0;  // silence or standstill of a rank that is a failure; must be positive
  // After a failure each rank's flight records are written to record_dir/rank-N.json, and what was
  // printed to record_dir/failure.txt; the folder is made then. Empty: nothing is written.
  std::string record_dir;
  // Rank 0 prints a line when the job is interrupted; else who started the ranks does.
  bool says_interrupted = true;
};

class FailureDetector {
 public:
  // Collective. Watched is the thread that writes the recorder. Unavailable, on all ranks, when two
  // of them cannot connect.
  static absl::StatusOr<std::unique_ptr<FailureDetector>> Start(
      ControlPlane& control, FlightRecorder& recorder, const FailureDetectorOptions& options);
  // Says goodbye: from here on this rank may go.
  ~FailureDetector();

  // Runs on the detector's thread after a failure, with one line about it, for at most about a
  // second before the process ends. `name` orders nothing; hooks run in the order they were added.
  // Returns a ticket for RemoveHook, which waits for a hook that is running.
  using Hook = std::function<void(const absl::Status&)>;
  int AddHook(Hook hook);
  void RemoveHook(int ticket);

  // A communicator whose calls are enqueued: its asynchronous errors are failures of this rank, and
  // it is aborted when the job has failed. It is asked on a thread of its own, since a device that
  // is stuck may keep who asks it. RemoveCommunicator waits for a question that is being answered;
  // before the communicator goes.
  void AddCommunicator(Communicator* communicator);
  void RemoveCommunicator(Communicator* communicator);

  // The failure of the job; OK while there is none. Any thread.
  absl::Status status() const;
  // This rank has an error that the others do not know of; they have `timeout_s` to come to know it
  // (ControlPlane::Agree), else it is the job's failure. OK: settled. The watched thread.
  void SetError(const absl::Status& status);
  // Ends the job because of this rank. Any thread.
  [[noreturn]] void Fail(const std::string& why, int exit_code);
  // The watched thread has nothing more to do; the detector ends the process.
  [[noreturn]] void WaitForEnd();
  // The job leaves with an error that all ranks know of and that is said: mpirun may kill who takes
  // its time over it, which nobody needs to hear of. Any thread.
  void SayNothingMore();
  // SIGINT or SIGTERM came: mpirun sends it to the survivors of a failure, people to a job they
  // want to end. The detector tells the two apart. Async-signal-safe.
  void NotifySignal();

 private:
  struct Impl;
  explicit FailureDetector(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// For its lifetime a detector, which may be null, watches a communicator.
class CommunicatorWatch {
 public:
  CommunicatorWatch(FailureDetector* detector, Communicator* communicator)
      : detector_(detector), communicator_(communicator) {
    if (detector_ != nullptr) detector_->AddCommunicator(communicator_);
  }
  ~CommunicatorWatch() {
    if (detector_ != nullptr) detector_->RemoveCommunicator(communicator_);
  }
  CommunicatorWatch(CommunicatorWatch&& other) noexcept
      : detector_(std::exchange(other.detector_, nullptr)), communicator_(other.communicator_) {}
  CommunicatorWatch& operator=(CommunicatorWatch&& other) noexcept {
    std::swap(detector_, other.detector_);
    std::swap(communicator_, other.communicator_);
    return *this;
  }

 private:
  FailureDetector* detector_;
  Communicator* communicator_;
};

}  // namespace trireme
