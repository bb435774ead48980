// Bounds the time in which the ranks of a job find each other. A rank that never comes to MPI_Init
// keeps the others there for ever, before there is anything between them that could tell: so each
// one shows by the name of a thread how far it is, and those that wait look for it in /proc, among
// the processes that the same launcher has started on their host.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace trireme {

struct StartWatchOptions {
  double timeout_s = 60.0;  // in MPI_Init; must be positive
  int rank = 0, ranks = 1;  // as the launcher says; ranks 0: it does not say
};

class StartWatch {
 public:
  // From here on the process ends, with a line that says who is missing, when the ranks have not
  // found each other in time.
  explicit StartWatch(const StartWatchOptions& options);
  // They have.
  ~StartWatch();
  StartWatch(const StartWatch&) = delete;
  StartWatch& operator=(const StartWatch&) = delete;
  // This rank comes to MPI_Init now; the time begins.
  void EnterMpi();

 private:
  void Run();
  bool SleepFor(double seconds);
  [[noreturn]] void End();

  const StartWatchOptions options_;
  std::mutex mutex_;  // of what follows
  std::condition_variable wake_;
  bool entered_ = false, found_ = false;
  std::thread thread_;
};

// A process of this job on this host.
struct StartingRank {
  int rank = -1;  // -1: its environment does not say
  int pid = 0;
  bool waits = false;    // in MPI_Init
  bool stopped = false;  // by SIGSTOP or a debugger
  bool over = false;     // has said who is missing, or has ended: so does the job
};
// What to say when the ranks of one host, this one among them, are all that is known: the line, and
// whom it accuses. `host` is this one's name.
struct StartVerdict {
  std::string line;
  std::vector<int> missing;  // indices into `here`
};
StartVerdict JudgeStart(const std::vector<StartingRank>& here, int ranks, double timeout_s,
                        const std::string& host);

}  // namespace trireme
