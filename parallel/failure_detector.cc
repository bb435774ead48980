#include "parallel/failure_detector.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "parallel/control_plane.h"
#include "parallel/failure_detector_impl.h"
#include "parallel/flight_recorder.h"
#include "parallel/process_watch.h"
#include "parallel/rank_links.h"
#include "parallel/stall.h"

namespace trireme {
namespace {

using Presence = WatchedRank::Presence;

constexpr int64_t kMs = 1'000'000;

// A beat in a twentieth of the timeout: several may be late before a rank counts as silent.
constexpr int kBeatsPerTimeout = 20;
constexpr int64_t kShortestBeatNs = 25 * kMs, kLongestBeatNs = 250 * kMs;

// mpirun sends the survivors of a failure SIGTERM, which is an interruption only when no rank turns
// out dead; a dead one's connection is closed before mpirun comes to know of it.
constexpr int64_t kInterruptNs = 30 * kMs;
// A rank that leaves before mpirun has sent it a signal has failed in mpirun's eyes.
constexpr int64_t kInterruptedPeerNs = 1000 * kMs;
constexpr int64_t kErrorAloneNs = 2000 * kMs;  // an error that nobody else knows of

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

// Of one rank to all it is linked with; the same program on both sides.
struct FailureDetector::Impl::Beat {
  RankState state;
  bool busy = false;          // its watched thread
  bool fatal = false;         // `error` ends the job now
  bool acknowledged = false;  // knows of the failure
  char error[400] = {};
};

// --- Watching. ---

void FailureDetector::Impl::Update(Peer& peer, const Beat& beat, int64_t now) {
  const RankState& old = peer.watched.state;
  const RankState& state = beat.state;
  const bool moved = state.calls_done != old.calls_done || state.steps_done != old.steps_done ||
                     state.phase != old.phase || state.step != old.step ||
                     state.outside != old.outside || state.last.sequence != old.last.sequence;
  peer.heard_ns = now;
  if (beat.busy) peer.cpu_ns = now;
  // A rank that waits in a call is busy polling.
  if (moved || (beat.busy && !state.in_call)) peer.progress_ns = now;
  const std::string error(beat.error, strnlen(beat.error, sizeof(beat.error)));
  if (error != peer.watched.error) peer.error_ns = now;
  peer.watched.error = error;
  peer.fatal = beat.fatal;
  peer.acknowledged = peer.acknowledged || beat.acknowledged;
  peer.watched.state = state;
}

void FailureDetector::Impl::SendBeats(int64_t now, bool acknowledged) {
  Beat beat;
  beat.state = recorder->State();
  beat.busy = probe.Busy(recorder->writing_thread());
  beat.acknowledged = acknowledged;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    own_error.copy(beat.error, sizeof(beat.error) - 1);
    beat.fatal = own_fatal;
  }
  Update(peers[rank], beat, now);
  Tell(kBeat, std::string_view(reinterpret_cast<const char*>(&beat), sizeof(beat)));
}

void FailureDetector::Impl::Tell(FailureMessage message, std::string_view bytes) {
  for (size_t r = 0; r < peers.size(); ++r) {
    if (links->linked(static_cast<int>(r))) links->Send(static_cast<int>(r), message, bytes);
  }
}

void FailureDetector::Impl::TakeMessage(const RankLinks::Event& event, int64_t now) {
  Peer& peer = peers[event.rank];
  switch (event.type) {
    case RankLinks::kClosed:
      if (peer.watched.presence == Presence::kLeft || peer.interrupted) return;
      // A stopped rank that is killed stays what it was reported as.
      if (peer.watched.presence == Presence::kHere) {
        peer.watched.presence = Presence::kDead;
        peer.watched.unreachable =
            event.error == ETIMEDOUT || event.error == EHOSTUNREACH || event.error == ENETUNREACH;
      }
      Found({Failure::Kind::kDied, {event.rank}, ""}, now);
      return;
    case kBeat: {
      CHECK_EQ(event.bytes.size(), sizeof(Beat));
      Beat beat;
      std::memcpy(&beat, event.bytes.data(), sizeof(beat));
      if (beat.fatal) next_beat_ns = now;  // look at once
      return Update(peer, beat, now);
    }
    case kGoodbye:
      peer.watched.presence = Presence::kLeft;
      return;
    case kInterrupted:
      peer.interrupted = true;
      // This rank's own signal is on its way, or the news of a death.
      if (interrupt_ns == 0) interrupt_ns = now + kInterruptedPeerNs;
      return;
    case kFailed:
      if (told.empty()) told = event.bytes;
      Found({Failure::Kind::kDied, {event.rank}, ""}, now);
      return;
    case kExit:
      return;  // only after kFailed, which ends in Follow()
  }
}

// The first failure is the job's; what comes after is mostly its consequence.
void FailureDetector::Impl::Found(Failure found, int64_t now) {
  if (failure) return;
  failure = std::move(found);
  failure_ns = now;
}

void FailureDetector::Impl::FindSilent(int64_t now) {
  for (Peer& peer : peers) {
    const int r = peer.watched.state.rank;
    if (r == rank || peer.watched.presence != Presence::kHere || !links->linked(r)) continue;
    if (now - peer.heard_ns < timeout_ns) continue;
    peer.watched.presence = Presence::kSilent;
    peer.watched.stopped = peer.process != nullptr && peer.process->IsStopped();
    if (failure && failure->kind == Failure::Kind::kSilent) {
      failure->ranks.push_back(r);
    } else {
      Found({Failure::Kind::kSilent, {r}, ""}, now);
    }
  }
}

void FailureDetector::Impl::FindErrors(int64_t now) {
  // An error that all ranks have is one they have agreed on, and they are leaving.
  const bool all = std::none_of(peers.begin(), peers.end(), [](const Peer& peer) {
    return peer.watched.presence == Presence::kHere && peer.watched.error.empty();
  });
  for (const Peer& peer : peers) {
    if (peer.watched.error.empty() || peer.watched.presence != Presence::kHere) continue;
    if (peer.fatal || (!all && now - peer.error_ns >= std::min(kErrorAloneNs, timeout_ns)))
      Found({Failure::Kind::kError, {peer.watched.state.rank}, peer.watched.error}, now);
  }
}

bool FailureDetector::Impl::Healthy(int r) const {
  return peers[r].watched.presence == Presence::kHere;
}

int FailureDetector::Impl::LowestHealthy(bool on_this_host) const {
  for (int r = 0; r < static_cast<int>(peers.size()); ++r) {
    if (Healthy(r) && (!on_this_host || r == rank || links->same_host(r))) return r;
  }
  return rank;
}

std::vector<WatchedRank> FailureDetector::Impl::Watched() const {
  std::vector<WatchedRank> out;
  const int64_t now = MonotonicNs();
  for (const Peer& peer : peers) {
    WatchedRank& one = out.emplace_back(peer.watched);
    one.silent_s = Seconds(now - peer.heard_ns);
    one.still_s = Seconds(now - peer.progress_ns);
    one.no_cpu_s = Seconds(now - peer.cpu_ns);
  }
  return out;
}

// The beats are of different moments: a rank may look stuck beside the newer beat of one that it
// waited for. So what is found must still be there when every rank has been heard once more.
void FailureDetector::Impl::FindStandstill(int64_t now) {
  std::optional<Failure> stall = FindStall(Watched(), Seconds(timeout_ns));
  if (!stall || stall->ranks != suspects) {
    suspects = stall ? stall->ranks : std::vector<int>();
    suspected_ns = now;
    return;
  }
  const bool all_heard = std::all_of(peers.begin(), peers.end(), [this](const Peer& peer) {
    const int r = peer.watched.state.rank;
    return !Healthy(r) || (r != rank && !links->linked(r)) || peer.heard_ns > suspected_ns;
  });
  if (all_heard) Found(*std::move(stall), now);
}

void FailureDetector::Impl::StartClocksAnew(int64_t now) {
  for (Peer& peer : peers) peer.heard_ns = peer.progress_ns = peer.cpu_ns = peer.error_ns = now;
}

void FailureDetector::Impl::Look(int64_t now) {
  // This process, or the machine, was itself stopped: nobody's silence means anything.
  if (now - last_look_ns > std::max(timeout_ns / 2, 4 * beat_ns)) StartClocksAnew(now);
  last_look_ns = now;
  SendBeats(now, /*acknowledged=*/false);
  LookAtLauncher(now);
  FindSilent(now);
  FindErrors(now);
  if (!failure && launcher_stopped_ns == 0 && LowestHealthy(/*on_this_host=*/false) == rank)
    FindStandstill(now);
}

// Everything that can happen, once.
void FailureDetector::Impl::PollOnce(int64_t until_ns) {
  std::vector<pollfd> others = {{wake_fd, POLLIN, 0}, {signal_fd, POLLIN, 0}};
  if (launcher->fd() >= 0) others.push_back({launcher->fd(), POLLIN, 0});
  // Rounded up, so as not to spin through the last millisecond.
  const int64_t wait = std::max<int64_t>(0, until_ns - MonotonicNs() + kMs - 1) / kMs;
  const std::vector<RankLinks::Event> events = links->Wait(static_cast<int>(wait), others);
  const int64_t now = MonotonicNs();
  for (const RankLinks::Event& event : events) TakeMessage(event, now);
  uint64_t count = 0;
  if (others[0].revents != 0 && read(wake_fd, &count, sizeof(count)) > 0) next_beat_ns = now;
  if (others[1].revents != 0 && read(signal_fd, &count, sizeof(count)) > 0) {
    Tell(kInterrupted);
    const int64_t at = now + kInterruptNs;
    interrupt_ns = interrupt_ns == 0 ? at : std::min(interrupt_ns, at);
  }
  const bool gone = others.size() > 2 ? others[2].revents != 0 : getppid() != launcher->pid();
  if (gone && !stop.load()) LauncherGone(now);
}

void FailureDetector::Impl::Run() {
  next_beat_ns = last_look_ns = MonotonicNs();
  while (true) {
    int64_t until = next_beat_ns;
    if (interrupt_ns != 0) until = std::min(until, interrupt_ns);
    PollOnce(until);
    if (stop.load()) return;
    const int64_t now = MonotonicNs();
    if (now >= next_beat_ns && !failure) {
      next_beat_ns = now + beat_ns;
      Look(now);
    }
    if (failure) End();
    if (interrupt_ns != 0 && now >= interrupt_ns) Interrupted();
  }
}

std::thread FailureDetector::Impl::StartThread(std::function<void()> run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(run));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

void FailureDetector::Impl::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_fd, &one, sizeof(one));
}

void FailureDetector::Impl::SetFatalError(const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex);
  own_error = why;
  own_fatal = true;
}

// --- The watched rank's side. ---

FailureDetector::FailureDetector(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<FailureDetector>> FailureDetector::Start(
    ControlPlane& control, FlightRecorder& recorder, const FailureDetectorOptions& options) {
  CHECK_GT(options.timeout_s, 0.0);
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->recorder = &recorder;
  impl->rank = control.rank();
  impl->timeout_ns = static_cast<int64_t>(options.timeout_s * 1e9);
  impl->beat_ns = std::clamp(impl->timeout_ns / kBeatsPerTimeout, kShortestBeatNs, kLongestBeatNs);
  impl->launcher = std::make_unique<ProcessHandle>(getppid());
  impl->launcher_name = impl->launcher->Name();
  impl->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  impl->signal_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK(impl->wake_fd >= 0 && impl->signal_fd >= 0) << std::strerror(errno);

  const std::string card = absl::StrCat(getpid(), " ", recorder.memory_fd(), " ", control.host());
  ASSIGN_OR_RETURN(impl->links, RankLinks::Connect(control, {impl->timeout_ns / kMs, card}));
  impl->peers.resize(control.size());
  const int64_t now = MonotonicNs();
  for (int r = 0; r < control.size(); ++r) {
    Impl::Peer& peer = impl->peers[r];
    const std::vector<std::string> fields =
        absl::StrSplit(impl->links->cards()[r], absl::MaxSplits(' ', 2));
    CHECK_EQ(fields.size(), 3u);
    peer.watched.state.rank = r;
    peer.watched.pid = std::atoi(fields[0].c_str());
    peer.watched.host = fields[2];
    peer.heard_ns = peer.progress_ns = peer.cpu_ns = now;
    if (r == control.rank() || !impl->links->same_host(r)) continue;
    peer.process = std::make_unique<ProcessHandle>(peer.watched.pid);
    // Not to be had in some containers: then beats are all that is known of the rank.
    auto log = FlightRecorder::Map(absl::StrCat("/proc/", fields[0], "/fd/", fields[1]));
    if (log.ok()) peer.log = *std::move(log);
  }
  // Nobody's memory goes away before all have mapped it.
  control.Barrier();
  std::unique_ptr<FailureDetector> detector(new FailureDetector(std::move(impl)));
  detector->impl_->thread = Impl::StartThread([state = detector->impl_.get()] { state->Run(); });
  return detector;
}

FailureDetector::~FailureDetector() {
  impl_->stop.store(true);
  impl_->StopPolling();
  impl_->Wake();
  impl_->thread.join();
  impl_->Tell(kGoodbye);
}

int FailureDetector::AddHook(Hook hook) {
  const std::lock_guard<std::mutex> lock(impl_->hooks_mutex);
  impl_->hooks.emplace_back(++impl_->next_hook, std::move(hook));
  return impl_->next_hook;
}

void FailureDetector::RemoveHook(int ticket) {
  const std::lock_guard<std::mutex> lock(impl_->hooks_mutex);
  std::erase_if(impl_->hooks, [ticket](const auto& entry) { return entry.first == ticket; });
}

absl::Status FailureDetector::Impl::status() const {
  if (!failed.load(std::memory_order_acquire)) [[likely]]
    return absl::OkStatus();
  const std::lock_guard<std::mutex> lock(mutex);
  return job_status;
}

absl::Status FailureDetector::status() const { return impl_->status(); }

void FailureDetector::SetError(const absl::Status& status) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (!impl_->own_fatal) impl_->own_error = std::string(status.message());
}

void FailureDetector::Fail(const std::string& why, int exit_code) {
  if (std::this_thread::get_id() == impl_->thread.get_id()) _exit(exit_code);
  impl_->SetFatalError(why);
  impl_->exit_code.store(exit_code);
  WaitForEnd();
}

void FailureDetector::WaitForEnd() {
  impl_->Wake();
  // The detector ends the process; should it be stuck itself, this does.
  std::this_thread::sleep_for(std::chrono::seconds(10));
  _exit(impl_->exit_code.load());
}

void FailureDetector::SayNothingMore() { impl_->silenced.store(true); }

void FailureDetector::NotifySignal() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(impl_->signal_fd, &one, sizeof(one));
}

}  // namespace trireme
