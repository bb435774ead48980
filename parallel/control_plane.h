// The one MPI session of a process: who am I, who else is there, and small host-memory messages
// between ranks. Works under mpirun, srun --mpi=pmix, and alone (a singleton of size 1). Collective
// calls must be made by all ranks in the same order, from one thread; point-to-point messages may
// be sent and received by any. MPI's own errors end the job (they are not recoverable).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/flight_recorder.h"

namespace trireme {

class FailureDetector;
struct FailureDetectorOptions;

class ControlPlane {
 public:
  // Initialises MPI and installs the fatal handler that aborts the whole job. Once per process;
  // argc/argv may be null.
  static absl::StatusOr<std::unique_ptr<ControlPlane>> Start(int* argc, char*** argv);
  ~ControlPlane();  // MPI_Finalize: collective

  int rank() const { return rank_; }
  int size() const { return size_; }
  int local_rank() const {
    return local_rank_;
  }  // among the ranks of this host (shared-memory split, not variables)
  int local_size() const { return local_size_; }
  const std::string& host() const { return host_; }

  // From here on a failure of any rank ends the job in bounded time, with a line that says which
  // rank failed and where (parallel/failure_detector.h). Collective; before any communicator is
  // made. A job of one rank has nobody to watch: then this does nothing.
  absl::Status Watch(const FailureDetectorOptions& options);
  FailureDetector* detector() const { return detector_.get(); }  // null when nobody watches
  FlightRecorder* recorder() const { return recorder_.get(); }   // null when nobody watches
  // For the handler of SIGINT and SIGTERM: false when nobody watches and the process is to end
  // itself.
  static bool NotifySignal();
  // Each says what this rank does now, and gives the job's failure once there is one: the caller
  // stops what it does.
  absl::Status EnterPhase(Phase phase);
  absl::Status BeginStep(Phase phase, int64_t step, int stage);
  void EndStep();
  // The failure of the job, whatever rank it is of; OK while there is none.
  absl::Status JobStatus() const;

  // Every rank ends up with root's bytes.
  void Broadcast(std::string* bytes, int root = 0);
  // Root gets everybody's bytes, by rank; the others an empty vector.
  std::vector<std::string> Gather(const std::string& bytes, int root = 0);
  // Everybody gets everybody's bytes, by rank.
  std::vector<std::string> AllGather(const std::string& bytes);
  void Barrier();
  // All ranks get the same status: OK when all are, else the one of the lowest failing rank,
  // payloads included, and while ranks watch each other with its name in front. How an error that
  // one rank found during load stops all of them.
  absl::Status Agree(const absl::Status& status);
  bool agreed_on_error() const { return agreed_on_error_; }  // in the last Agree

  // Ordered, reliable point-to-point messages between any two ranks, on a communicator of their
  // own. Send never waits for the receiver (the control plane keeps a copy until it is delivered).
  // `channel` separates independent streams.
  void Send(int peer, int channel, const std::string& bytes);
  // Into `bytes`, whose memory is used again. Receive waits, TryReceive never does.
  void Receive(int peer, int channel, std::string* bytes);
  bool TryReceive(int peer, int channel, std::string* bytes);
  std::string Receive(int peer, int channel) {
    std::string bytes;
    Receive(peer, channel, &bytes);
    return bytes;
  }
  std::optional<std::string> TryReceive(int peer, int channel) {
    std::string bytes;
    return TryReceive(peer, channel, &bytes) ? std::optional(std::move(bytes)) : std::nullopt;
  }
  void FlushSends();  // waits until all are delivered

  // Ends every rank of the job now, with this exit code. `why` is for people.
  [[noreturn]] void Abort(int exit_code, const std::string& why = "");

 private:
  ControlPlane();
  struct Impl;  // keeps mpi.h out of this header
  bool Poll(int peer, int channel, std::string* bytes);
  absl::Status WithRank(const absl::Status& status) const;
  absl::Status AgreeOnStatus(const absl::Status& status);
  void BroadcastBytes(std::string* bytes, int root);
  std::unique_ptr<Impl> impl_;
  std::unique_ptr<FlightRecorder> recorder_;
  std::unique_ptr<FailureDetector> detector_;
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::string host_;
  bool agreed_on_error_ = false;
};

}  // namespace trireme
