// The one MPI session of a process: who am I, who else is there, and small host-memory messages
// between ranks. Works under mpirun, srun --mpi=pmix, and alone (a singleton of size 1). Collective
// calls must be made by all ranks in the same order, from one thread. MPI's own errors end the job
// (they are not recoverable).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

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

  // Every rank ends up with root's bytes.
  void Broadcast(std::string* bytes, int root = 0);
  // Root gets everybody's bytes, by rank; the others an empty vector.
  std::vector<std::string> Gather(const std::string& bytes, int root = 0);
  // Everybody gets everybody's bytes, by rank.
  std::vector<std::string> AllGather(const std::string& bytes);
  void Barrier();
  // All ranks get the same status: OK when all are, else the one of the lowest failing rank,
  // payloads included. How an error that one rank found during load stops all of them.
  absl::Status Agree(const absl::Status& status);

  // Ordered, reliable point-to-point messages between any two ranks, on a communicator of their
  // own. Send never waits for the receiver (bytes are owned by the control plane until delivered).
  // `channel` separates independent streams.
  void Send(int peer, int channel, std::string bytes);
  std::string Receive(int peer, int channel);                    // waits
  std::optional<std::string> TryReceive(int peer, int channel);  // never waits
  void FlushSends();                                             // waits until all are delivered

  // Ends every rank of the job now, with this exit code.
  [[noreturn]] void Abort(int exit_code);

 private:
  ControlPlane();
  struct Impl;  // keeps mpi.h out of this header
  std::unique_ptr<Impl> impl_;
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::string host_;
};

}  // namespace trireme
