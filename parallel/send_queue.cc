#include "parallel/send_queue.h"

#include <mpi.h>
#include <sched.h>

#include <chrono>
#include <vector>

#include "kernels/check.h"
#include "parallel/mpi_check.h"

namespace trireme {
namespace {

// Between two looks at MPI: short beside a stage's milliseconds, long beside the microsecond a look
// takes.
constexpr std::chrono::microseconds kPause(50);

bool ThreadsMayCallMpi() {
  int provided = MPI_THREAD_SINGLE;
  MPI_CHECK(MPI_Query_thread(&provided));
  return provided == MPI_THREAD_MULTIPLE;
}

}  // namespace

struct SendQueue::Pending {
  MPI_Comm comm = MPI_COMM_NULL;
  std::vector<MPI_Request> sends;  // a handful
};

SendQueue::SendQueue(int fortran_comm) : pending_(std::make_unique<Pending>()) {
  pending_->comm = MPI_Comm_f2c(fortran_comm);
  pending_->sends.reserve(64);  // how many are on their way at once is left to chance
}

SendQueue::~SendQueue() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

int64_t SendQueue::Send(const void* data, int bytes, int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Advance();
  pending_->sends.emplace_back();
  MPI_CHECK(
      MPI_Isend(data, bytes, MPI_BYTE, peer, /*tag=*/0, pending_->comm, &pending_->sends.back()));
  const int64_t ticket = first_ticket_ + static_cast<int64_t>(pending_->sends.size()) - 1;
  Advance();
  if (pending_->sends.empty()) return ticket;
  if (!thread_.joinable() && ThreadsMayCallMpi()) thread_ = std::thread(&SendQueue::Run, this);
  work_.notify_one();
  return ticket;
}

void SendQueue::Wait(int64_t ticket) {
  CHECK_GT(ticket, 0);
  while (true) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      CHECK_LT(ticket, first_ticket_ + static_cast<int64_t>(pending_->sends.size()))
          << "never sent";
      Advance();
      if (ticket < first_ticket_) return;
    }
    sched_yield();
  }
}

// Messages leave the queue in the order they entered it.
void SendQueue::Advance() {
  while (!pending_->sends.empty()) {
    int done = 0;
    MPI_CHECK(MPI_Test(&pending_->sends.front(), &done, MPI_STATUS_IGNORE));
    if (!done) return;
    pending_->sends.erase(pending_->sends.begin());
    ++first_ticket_;
  }
}

void SendQueue::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_ || !pending_->sends.empty(); });
    if (stop_) return;
    Advance();
    if (pending_->sends.empty()) continue;
    lock.unlock();
    std::this_thread::sleep_for(kPause);
    lock.lock();
  }
}

}  // namespace trireme
