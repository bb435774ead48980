// The messages a rank has sent and that are still on their way. MPI moves a large message only
// while its sender is inside MPI; a pipeline stage that computes for half a second would keep the
// next one waiting as long. A thread of the queue's own takes that over, and sleeps while nothing
// is under way. Used by the MPI communicator; one caller at a time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace trireme {

class SendQueue {
 public:
  // For the communicator with this Fortran handle (which keeps mpi.h out of here), which must
  // outlive the queue.
  explicit SendQueue(int fortran_comm);
  ~SendQueue();

  // Starts sending; `data` must not change before Wait(ticket) has returned. Messages to one peer
  // arrive in order.
  int64_t Send(const void* data, int bytes, int peer);
  void Wait(int64_t ticket);

 private:
  struct Pending;
  void Advance();  // REQUIRES: mutex_ held
  void Run();

  std::mutex mutex_;
  std::condition_variable work_;
  // Of the tickets from first_ticket_ on; older ones are complete.
  std::unique_ptr<Pending> pending_;
  int64_t first_ticket_ = 1;
  bool stop_ = false;
  std::thread thread_;  // started by the first message that does not leave at once
};

}  // namespace trireme
