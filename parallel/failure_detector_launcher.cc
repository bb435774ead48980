// A failure detector's watch over what started the ranks: mpirun or its daemon on this host; see
// failure_detector.h.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "parallel/failure_detector_impl.h"

namespace trireme {
namespace {

using Presence = WatchedRank::Presence;

constexpr int kLauncherLeavesMs = 5000;  // twice what mpirun takes to end when all hosts answer

// Where there is room for it: standard error goes through mpirun, and one that is stopped does not
// read. A pipe that poll() calls writable takes PIPE_BUF bytes at once.
void WarnWithoutWaiting(const std::string& line) {
  pollfd pipe = {STDERR_FILENO, POLLOUT, 0};
  if (poll(&pipe, 1, 0) != 1 || (pipe.revents & POLLOUT) == 0) return;
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace

void FailureDetector::Impl::LauncherGone(int64_t now) {
  Found({Failure::Kind::kLauncherGone,
         {},
         absl::StrCat(launcher_name, " (pid ", launcher->pid(),
                      "), which started this job, is gone")},
        now);
}

// Somebody pauses the launcher (Ctrl-Z). The ranks go on as far as they can without it, which
// carries their output and is asked at the end of MPI: while it is stopped, and for a timeout
// after, nobody who waits is stuck.
void FailureDetector::Impl::LookAtLauncher(int64_t now) {
  if (!launcher->IsStopped()) {
    if (launcher_stopped_ns != 0) StartClocksAnew(now);
    launcher_stopped_ns = 0;
    return;
  }
  if (launcher_stopped_ns == 0) {
    launcher_stopped_ns = now;
    launcher_warned = false;
  }
  const int64_t stopped_ns = now - launcher_stopped_ns;
  if (rank != 0 || launcher_warned || stopped_ns < timeout_ns) return;
  launcher_warned = true;
  const int pid = launcher->pid();
  WarnWithoutWaiting(absl::StrFormat(
      "trireme: warning: %s (pid %d) is stopped (SIGSTOP, Ctrl-Z or a debugger) for %.1f s: output "
      "waits, and the job cannot end; kill -CONT %d continues it, kill -KILL %d ends the job\n",
      launcher_name, pid, static_cast<double>(stopped_ns) * 1e-9, pid, pid));
}

// mpirun and its daemons wait for the daemon of a host that is lost until TCP gives up: a quarter
// of an hour, whatever the keepalive, since what they have sent is not acknowledged.
void FailureDetector::Impl::LimitLauncher() {
  const bool lost = std::any_of(peers.begin(), peers.end(), [this](const Peer& peer) {
    return peer.watched.host != peers[rank].watched.host &&
           (peer.watched.presence == Presence::kSilent || peer.watched.unreachable);
  });
  constexpr std::string_view kWaiting[] = {"mpirun", "mpiexec", "orterun",
                                           "orted",  "prterun", "prted"};
  if (lost && LowestHealthy(/*on_this_host=*/true) == rank &&
      std::find(std::begin(kWaiting), std::end(kWaiting), launcher_name) != std::end(kWaiting))
    KillUnlessItEnds(launcher->pid(), kLauncherLeavesMs);
}

}  // namespace trireme
