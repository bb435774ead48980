// How a failure detector ends the job; see failure_detector.h.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/failure_detector_impl.h"
#include "parallel/mpi_check.h"

namespace trireme {
namespace {

using Presence = WatchedRank::Presence;

constexpr int64_t kMs = 1'000'000;
constexpr int kInterruptedExitCode = 130;

// mpirun kills the survivors of a dead rank after a second: what is said of the failure is said
// before.
constexpr int64_t kCollectNs = 200 * kMs;    // for the survivors' last words
constexpr int64_t kHooksNs = 500 * kMs;      // for failing the requests in flight
constexpr int64_t kReporterNs = 1500 * kMs;  // for the reporter to tell this rank what has failed
constexpr int64_t kFollowerNs = 3000 * kMs;  // for the reporter to let this rank go
constexpr int64_t kLeaveNs = 700 * kMs;      // for the ranks to leave, then those left are killed
constexpr int64_t kInterruptedLeaderNs = 1500 * kMs;  // for rank 0 to leave before this rank does
constexpr int kBeatWhileLeavingMs = 20;
constexpr int64_t kLastWordNs = 50 * kMs;  // rank 0 speaks of an interruption before mpirun sees
                                           // that a rank has left

void WriteError(const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(STDERR_FILENO, text.data() + done, text.size() - done);
    if (n < 0 && errno != EINTR) return;
    if (n > 0) done += static_cast<size_t>(n);
  }
}

}  // namespace

void FailureDetector::Impl::End() {
  const int reporter = LowestHealthy(/*on_this_host=*/false);
  if (told.empty() && reporter != rank) {
    // The reporter sees what this rank sees. Should it fail too, its connection closes, or the time
    // is over.
    SendBeats(MonotonicNs(), /*acknowledged=*/true);
    while (told.empty() && MonotonicNs() < failure_ns + kReporterNs &&
           LowestHealthy(/*on_this_host=*/false) != rank)
      PollOnce(failure_ns + kReporterNs);
  }
  told.empty() ? Report() : Follow();
  Exit(exit_code.load());
}

// The newest states: those on this host are read from their logs, dead or alive.
void FailureDetector::Impl::Refresh(int64_t now) {
  for (Peer& peer : peers) {
    if (peer.log != nullptr) peer.watched.state = peer.log->State();
  }
  peers[rank].watched.state = recorder->State();
  peers[rank].heard_ns = now;
}

void FailureDetector::Impl::Report() {
  Refresh(MonotonicNs());
  const std::string line = FailureLine(*failure, Watched());
  SetJobStatus(line);
  Tell(kFailed, line);
  const auto all_know = [this] {
    return std::all_of(peers.begin(), peers.end(), [this](const Peer& peer) {
      const int r = peer.watched.state.rank;
      return r == rank || !Healthy(r) || peer.acknowledged || !links->linked(r);
    });
  };
  while (!all_know() && MonotonicNs() < failure_ns + kCollectNs) PollOnce(failure_ns + kCollectNs);
  Refresh(MonotonicNs());
  std::string block = absl::StrCat("trireme: ", FailureLine(*failure, Watched()), "\n",
                                   FailureTable(*failure, Watched()));
  if (!options.record_dir.empty())
    absl::StrAppend(&block, "  flight records: ", options.record_dir, "/rank-*.json\n");
  if (!silenced.load()) WriteError(block);
  report = block;
  RunHooks();
  WriteRecords();
  AbortCommunicators();
  KillFrozen(/*everybody=*/false);
  LimitLauncher();
  LetGo();
}

void FailureDetector::Impl::Follow() {
  SetJobStatus(told);
  SendBeats(MonotonicNs(), /*acknowledged=*/true);
  RunHooks();
  WriteRecords();
  AbortCommunicators();
  if (LowestHealthy(/*on_this_host=*/true) == rank) KillFrozen(/*everybody=*/false);
  LimitLauncher();
  const int64_t until = failure_ns + kFollowerNs;
  const int reporter = LowestHealthy(/*on_this_host=*/false);
  bool may_go = false;
  while (!may_go && links->linked(reporter) && MonotonicNs() < until) {
    const std::vector<RankLinks::Event> events =
        links->Wait(static_cast<int>((until - MonotonicNs()) / kMs) + 1, {});
    for (const RankLinks::Event& event : events) may_go = may_go || event.type == kExit;
  }
}

void FailureDetector::Impl::SetJobStatus(const std::string& line) {
  const std::lock_guard<std::mutex> lock(mutex);
  job_status = absl::AbortedError(line);
  failed.store(true);
}

// On a thread that is left behind when it waits for something: nothing may hold up the end.
void FailureDetector::Impl::RunAtMost(int64_t limit_ns, std::function<void()> work) {
  const auto done = std::make_shared<std::atomic<bool>>(false);
  std::thread([done, work = std::move(work)] {
    work();
    done->store(true);
  }).detach();
  const int64_t until = MonotonicNs() + limit_ns;
  while (!done->load() && MonotonicNs() < until)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void FailureDetector::Impl::RunHooks() {
  RunAtMost(kHooksNs, [this] {
    const std::lock_guard<std::mutex> lock(hooks_mutex);
    for (const auto& [ticket, hook] : hooks) hook(status());
  });
}

// This rank's, and those of dead ranks whose logs only their neighbours can still read.
void FailureDetector::Impl::WriteRecords() {
  if (options.record_dir.empty() || silenced.load()) return;
  if (mkdir(options.record_dir.c_str(), 0755) != 0 && errno != EEXIST) {
    if (LowestHealthy(/*on_this_host=*/true) == rank) {
      WriteError(absl::StrCat("  flight records: ", options.record_dir,
                              ": cannot be made: ", std::strerror(errno), "\n"));
    }
    return;
  }
  const bool heir = LowestHealthy(/*on_this_host=*/true) == rank;
  // mpirun, which standard error goes through, may be what has failed.
  if (!report.empty()) WriteTextFile(options.record_dir + "/failure.txt", report).IgnoreError();
  for (const Peer& peer : peers) {
    const int r = peer.watched.state.rank;
    const bool mine = r == rank;
    if (!mine && !(heir && peer.log != nullptr && !Healthy(r))) continue;
    const absl::Status written =
        WriteTextFile(absl::StrCat(options.record_dir, "/rank-", r, ".json"),
                      (mine ? *recorder : *peer.log).ToJson(peer.watched.host));
    if (written.ok()) continue;
    // One line a host: it is the same disk for all of them.
    if (heir) WriteError(absl::StrCat("  flight records: ", written.message(), "\n"));
    return;
  }
}

void FailureDetector::Impl::KillFrozen(bool everybody) {
  for (const Peer& peer : peers) {
    const int r = peer.watched.state.rank;
    if (r == rank || peer.process == nullptr || peer.watched.presence == Presence::kLeft) continue;
    if (everybody ? links->linked(r) : peer.watched.presence == Presence::kSilent)
      peer.process->Kill();
  }
}

// Those who can leave do; then those on this host who cannot are killed; where somebody is left on
// another one, MPI's own daemons are asked.
void FailureDetector::Impl::LetGo() {
  Tell(kExit);
  const auto somebody = [this] {
    for (int r = 0; r < static_cast<int>(peers.size()); ++r) {
      if (r != rank && links->linked(r)) return true;
    }
    return false;
  };
  for (int round = 0; round < 2 && somebody(); ++round) {
    if (round == 1) KillFrozen(/*everybody=*/true);
    const int64_t until = MonotonicNs() + kLeaveNs;
    while (somebody() && MonotonicNs() < until)
      links->Wait(static_cast<int>((until - MonotonicNs()) / kMs) + 1, {});
  }
  if (!somebody() && links->same_host(static_cast<int>(peers.size()) - 1)) return;
  RemoveSharedSegments();  // MPI_Abort may be the last thing this process does
  const int code = exit_code.load();
  std::thread([code] { mpi_internal::AbortMpi(code); }).detach();
  std::this_thread::sleep_for(std::chrono::nanoseconds(kLeaveNs));
}

void FailureDetector::Impl::Interrupted() {
  if (rank == 0) {
    if (options.says_interrupted) WriteError("\ntrireme: interrupted\n");
    std::this_thread::sleep_for(std::chrono::nanoseconds(kLastWordNs));
  }
  // mpirun kills the others as soon as one has left: rank 0 goes first, which has the last word.
  const int64_t until = MonotonicNs() + kInterruptedLeaderNs;
  while (rank != 0 && links->linked(0) && MonotonicNs() < until) {
    SendBeats(MonotonicNs(), /*acknowledged=*/false);
    links->Wait(kBeatWhileLeavingMs, {});
  }
  Exit(kInterruptedExitCode);
}

void FailureDetector::Impl::Exit(int code) {
  RemoveSharedSegments();
  _exit(code);
}

}  // namespace trireme
