// The state of a failure detector, shared by its sources: failure_detector.cc watches the ranks,
// failure_detector_communicators.cc this rank's communicators, failure_detector_launcher.cc what
// started the ranks; failure_detector_end.cc ends the job.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/failure_detector.h"
#include "parallel/flight_recorder.h"
#include "parallel/process_watch.h"
#include "parallel/rank_links.h"
#include "parallel/stall.h"

namespace trireme {

enum FailureMessage : uint8_t { kBeat = 1, kGoodbye, kInterrupted, kFailed, kExit };

struct FailureDetector::Impl {
  static constexpr int kFailedExitCode = 1;
  struct Peer {
    WatchedRank watched;
    std::unique_ptr<ProcessHandle> process;     // on this host
    std::unique_ptr<const FlightRecorder> log;  // its own, mapped; on this host
    int64_t heard_ns = 0, progress_ns = 0, cpu_ns = 0, error_ns = 0;
    bool fatal = false, interrupted = false, acknowledged = false;
  };
  struct Beat;

  FailureDetectorOptions options;
  FlightRecorder* recorder = nullptr;
  int rank = 0;
  std::vector<Peer> peers;  // by rank; this rank's own too
  std::unique_ptr<RankLinks> links;
  std::unique_ptr<ProcessHandle> launcher;
  std::string launcher_name;
  ThreadProbe probe;
  int64_t timeout_ns = 0, beat_ns = 0;

  // --- The detector's thread alone. ---
  int64_t next_beat_ns = 0, last_look_ns = 0;
  int64_t interrupt_ns = 0;   // when an interruption is taken for one; 0 = none
  std::vector<int> suspects;  // of a standstill that is not certain yet
  int64_t suspected_ns = 0;
  int64_t launcher_stopped_ns = 0;  // seen to be stopped since then; 0 = runs
  bool launcher_warned = false;     // has been said of this stop
  std::optional<Failure> failure;
  int64_t failure_ns = 0;
  std::string told;    // the reporter's line about it
  std::string report;  // what this rank has printed about it

  // --- All threads. ---
  int wake_fd = -1, signal_fd = -1;
  std::atomic<bool> stop{false}, failed{false}, silenced{false};
  std::atomic<int> exit_code{kFailedExitCode};
  mutable std::mutex mutex;  // of what follows
  absl::Status job_status;   // set once
  std::string own_error;
  bool own_fatal = false;
  std::mutex hooks_mutex;  // held while they run
  std::vector<std::pair<int, Hook>> hooks;
  int next_hook = 0;
  std::thread thread;
  std::mutex communicators_mutex;  // held while they are asked or aborted
  std::condition_variable communicators_wake;
  std::vector<Communicator*> communicators;
  std::thread poller;  // since there was a communicator

  ~Impl() {
    if (wake_fd >= 0) close(wake_fd);
    if (signal_fd >= 0) close(signal_fd);
  }

  void Run();
  void Look(int64_t now);
  void TakeMessage(const RankLinks::Event& event, int64_t now);
  void Update(Peer& peer, const Beat& beat, int64_t now);
  void SendBeats(int64_t now, bool acknowledged);
  void Tell(FailureMessage message, std::string_view bytes = {});
  void Found(Failure found, int64_t now);
  void FindSilent(int64_t now);
  void FindErrors(int64_t now);
  void FindStandstill(int64_t now);
  void StartClocksAnew(int64_t now);
  void Refresh(int64_t now);
  std::vector<WatchedRank> Watched() const;
  bool Healthy(int r) const;
  int LowestHealthy(bool on_this_host) const;
  void PollOnce(int64_t until_ns);

  void SetFatalError(const std::string& why);
  void Wake();
  // Signals are for the program's own threads.
  static std::thread StartThread(std::function<void()> run);

  // --- failure_detector_communicators.cc ---
  void PollCommunicators();
  void AbortCommunicators();
  void StopPolling();

  // --- failure_detector_launcher.cc ---
  void LauncherGone(int64_t now);
  void LookAtLauncher(int64_t now);
  void LimitLauncher();

  // --- failure_detector_end.cc ---
  [[noreturn]] void End();
  void Report();
  void Follow();
  void SetJobStatus(const std::string& line);
  absl::Status status() const;
  void RunHooks();
  static void RunAtMost(int64_t limit_ns, std::function<void()> work);
  void WriteRecords();
  void KillFrozen(bool everybody);
  void LetGo();
  [[noreturn]] void Interrupted();
  [[noreturn]] void Exit(int code);
};

}  // namespace trireme
