// What the failure detector knows of the ranks, and what follows from it: who waits for whom, whose
// fault that is, and how to say it. Pure functions of what the ranks report; no clock, no sockets.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "parallel/flight_recorder.h"

namespace trireme {

// One rank as the detector of another sees it.
struct WatchedRank {
  enum class Presence { kHere, kLeft /* said goodbye */, kDead, kSilent };
  std::string host;
  int pid = 0;
  Presence presence = Presence::kHere;
  RankState state;           // the newest known
  double silent_s = 0.0;     // since its last beat
  double still_s = 0.0;      // since it last made progress
  double no_cpu_s = 0.0;     // since its watched thread last used the processor or the disk
  bool unreachable = false;  // dead: its host did not answer any more, rather than hang up
  bool stopped = false;      // silent: the process exists and is stopped
  std::string error;         // an error that it alone has
  double error_s = 0.0;      // since when
};

struct Failure {
  enum class Kind { kDied, kSilent, kStuck, kDeadlock, kError, kLauncherGone };
  Kind kind = Kind::kDied;
  std::vector<int> ranks;  // whose fault it is; empty for the launcher
  std::string detail;      // of an error, or the launcher
};

// The failure that a standstill is, if it is one. `ranks` by rank. A rank waits when it is in a
// call that takes longer than timeout_s and the time its bytes may take; it is excused while some
// rank it waits for, directly or through others, makes progress or waits for something outside of
// the job.
std::optional<Failure> FindStall(std::span<const WatchedRank> ranks, double timeout_s);

// "rank 2 (node1, pid 77) died in decode, step 118, in all_reduce #53 of tp 2-3 (256 B)".
std::string FailureLine(const Failure& failure, std::span<const WatchedRank> ranks);
// A line per rank, with what it does, and a line per collective that some ranks of the group have
// entered and some have not. Ends with a newline. Long jobs: only ranks that matter.
std::string FailureTable(const Failure& failure, std::span<const WatchedRank> ranks);

}  // namespace trireme
