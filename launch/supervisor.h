// The process that the user started when it starts the ranks itself: `trireme ... --ranks N` runs
// the program again under mpirun on this machine, passes Ctrl-C on, and ends with the job's exit
// status; with --max-restarts it also prints what the job produces, and starts the job again when a
// rank has failed. Nothing outlives it.
#pragma once

#include <string>
#include <vector>

namespace trireme {

struct SupervisorOptions {
  int ranks = 0;
  int max_restarts = 0;
  bool cuda = false;                   // the ranks are to have GPUs
  bool json = false;                   // answers are JSON lines; so are those that never come
  std::vector<std::string> arguments;  // without the program's name
};

// Whether this process is one of the ranks that a RunSupervised has started: by its variable, which
// mpirun hands on.
bool StartedBySupervisor();

// The exit status of the program.
int RunSupervised(const SupervisorOptions& options);

}  // namespace trireme
