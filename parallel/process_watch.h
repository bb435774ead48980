// What Linux says of processes and threads: whether one works, stands or is gone, and what it would
// leave behind. Used by the failure detector.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace trireme {

// Whether a thread of this process does something, as opposed to sleeping in a wait that may never
// end. Asked by one other thread.
class ThreadProbe {
 public:
  // Since the last call: thread `tid` used the processor, had to fetch a page, waits for the disk,
  // or waits for a processor. Of a thread that is new or has ended nothing is known: yes.
  bool Busy(int tid);

 private:
  int tid_ = -1;
  int64_t cpu_ns_ = 0, asked_ns_ = 0;
  uint64_t page_faults_ = 0;
};

// A process that may end at any moment, and whose number may then be somebody else's.
class ProcessHandle {
 public:
  explicit ProcessHandle(pid_t pid);
  ~ProcessHandle();
  ProcessHandle(const ProcessHandle&) = delete;
  ProcessHandle& operator=(const ProcessHandle&) = delete;
  pid_t pid() const { return pid_; }
  // Readable for poll() when the process has ended; -1 where the system has no such thing.
  int fd() const { return fd_; }
  void Kill() const;         // SIGKILL
  bool IsStopped() const;    // by SIGSTOP, or by a debugger
  std::string Name() const;  // "mpirun"

 private:
  pid_t pid_;
  int fd_;
};

// The processes that any thread of `pid` has started, or that were left to it, and that have not
// ended.
std::vector<pid_t> LivingChildren(pid_t pid);

// Kills `pid` and the processes that it has started, unless it ends within the time. From a process
// of its own, since this one may end; where the system has no fd() for processes, nothing happens.
void KillUnlessItEnds(pid_t pid, int timeout_ms);

// Gives back the shared memory that MPI would have removed at a proper end: the files of this job's
// ranks beside those that this process has mapped. Other jobs' have other names.
void RemoveSharedSegments();

}  // namespace trireme
