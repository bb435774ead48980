#include "parallel/control_plane.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "parallel/failure_detector.h"
#include "parallel/mpi_check.h"
#include "parallel/mpi_environment.h"

namespace trireme {
namespace {

// What a shell reports for abort(): a failed CHECK looks the same with and without MPI.
constexpr int kFatalExitCode = 134;

// Polls before a waiting rank offers its core to others. A poll takes about 0.1 us, so a message
// that is on its way is met without a system call, and an over-subscribed peer gets the core after
// a few microseconds.
constexpr int kSpins = 50;

// Of the process's one MPI session; a failed CHECK goes through it.
std::atomic<FailureDetector*> g_detector{nullptr};

void AbortJob(const std::string& message) {
  if (FailureDetector* detector = g_detector.load()) detector->Fail(message, kFatalExitCode);
  mpi_internal::AbortMpi(kFatalExitCode);
}

int IntCount(size_t bytes) {
  CHECK_LE(bytes, static_cast<size_t>(INT_MAX)) << "message too long for MPI";
  return static_cast<int>(bytes);
}

// Spins first, then yields.
class Backoff {
 public:
  void Pause() {
    if (++polls_ > kSpins) sched_yield();
  }

 private:
  int polls_ = 0;
};

// "CODE LENGTH MESSAGE" and then "LENGTH URL LENGTH VALUE" for every payload.
std::string PackStatus(const absl::Status& status) {
  std::string packed =
      absl::StrCat(status.raw_code(), " ", status.message().size(), " ", status.message());
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& value) {
    absl::StrAppend(&packed, url.size(), " ", url, value.size(), " ", std::string(value));
  });
  return packed;
}

absl::Status UnpackStatus(const std::string& packed) {
  const char* next = packed.c_str();
  const char* const end = next + packed.size();
  const auto number = [&next] {
    char* after = nullptr;
    const long value = std::strtol(next, &after, 10);
    next = after + 1;  // past the space
    return value;
  };
  const auto text = [&next, &number] {
    const long length = number();
    std::string value(next, length);
    next += length;
    return value;
  };
  const auto code = static_cast<absl::StatusCode>(number());
  absl::Status status(code, text());
  while (next < end) {
    const std::string url = text();
    status.SetPayload(url, absl::Cord(text()));
  }
  return status;
}

}  // namespace

namespace mpi_internal {
void FatalMpiError(int code, const char* call, const char* file, int line) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
  Fatal(file, line, absl::StrCat(call, " failed: ", std::string(text, length)));
}

void AbortMpi(int exit_code) {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized && !finalized) MPI_Abort(MPI_COMM_WORLD, exit_code);
}
}  // namespace mpi_internal

struct ControlPlane::Impl {
  struct PendingSend {
    std::string bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  std::mutex mutex;  // of the point-to-point messages, which any thread may send and look for
  MPI_Comm collectives = MPI_COMM_NULL;
  MPI_Comm messages = MPI_COMM_NULL;
  // List nodes never move, so MPI may hold pointers into them; spare ones are reused without
  // allocating.
  std::list<PendingSend> pending, spare;
  std::unordered_map<int, std::deque<std::string>> to_self;  // by channel

  void ReapSends() {
    for (auto it = pending.begin(); it != pending.end();) {
      int done = 0;
      MPI_CHECK(MPI_Test(&it->request, &done, MPI_STATUS_IGNORE));
      const auto next = std::next(it);
      if (done) spare.splice(spare.begin(), pending, it);
      it = next;
    }
  }
};

ControlPlane::ControlPlane() : impl_(std::make_unique<Impl>()) {}

absl::StatusOr<std::unique_ptr<ControlPlane>> ControlPlane::Start(int* argc, char*** argv) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  CHECK(!initialized) << "a process has one MPI session";
  PrepareMpiEnvironment();
  int provided = 0;
  // MPI_THREAD_MULTIPLE lets a failed CHECK abort the job from any thread; with less it still
  // nearly always works.
  if (const int code = MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
      code != MPI_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("MPI_Init_thread failed with code ", code,
                     ": the Open MPI of mpirun or srun and the one this program is linked with do "
                     "not fit together"));
  }
  // Inherited by every communicator derived from it; MPI_CHECK then says where.
  MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));

  std::unique_ptr<ControlPlane> plane(new ControlPlane);
  Impl& impl = *plane->impl_;
  MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &plane->rank_));
  MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &plane->size_));
  char name[MPI_MAX_PROCESSOR_NAME];
  int length = 0;
  MPI_CHECK(MPI_Get_processor_name(name, &length));
  plane->host_.assign(name, length);
  SetFatalPrefix(absl::StrCat("rank ", plane->rank_, " (", plane->host_, ")"));
  SetFatalHandler(&AbortJob);

  MPI_Comm host = MPI_COMM_NULL;
  MPI_CHECK(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, plane->rank_, MPI_INFO_NULL,
                                &host));
  MPI_CHECK(MPI_Comm_rank(host, &plane->local_rank_));
  MPI_CHECK(MPI_Comm_size(host, &plane->local_size_));
  // Of a few steps to everybody: how many are on their way at once is left to chance.
  constexpr int kSpares = 64;
  for (int i = 0; i < std::min(4 * plane->size_, kSpares); ++i)
    plane->impl_->spare.emplace_back().bytes.reserve(4096);
  MPI_CHECK(MPI_Comm_free(&host));
  MPI_CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &impl.collectives));
  MPI_CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &impl.messages));
  return plane;
}

ControlPlane::~ControlPlane() {
  // After a failure nobody comes to the collectives below.
  if (!JobStatus().ok()) detector_->WaitForEnd();
  FlushSends();
  {
    const FlightRecorder::Scope scope(recorder_.get(), CommOp::kFinalize, 0, 0);
    MPI_Comm_free(&impl_->messages);
    MPI_Comm_free(&impl_->collectives);
    if (detector_ == nullptr) SetFatalHandler(nullptr);
    MPI_Finalize();
  }
  SetFatalHandler(nullptr);
  g_detector.store(nullptr);
  detector_.reset();
}

absl::Status ControlPlane::Watch(const FailureDetectorOptions& options) {
  CHECK(detector_ == nullptr);
  if (size_ == 1) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<FlightRecorder>> recorder = FlightRecorder::Create(rank_);
  RETURN_IF_ERROR(Agree(recorder.status()));
  // The detector's own start is not recorded: the same calls are made on all ranks all the same.
  ASSIGN_OR_RETURN(detector_, FailureDetector::Start(*this, **recorder, options));
  recorder_ = *std::move(recorder);
  CommGroup world{.size = size_};
  std::strncpy(world.name.data(), "world", world.name.size() - 1);
  CHECK_EQ(recorder_->AddGroup(world), 0);
  g_detector.store(detector_.get());
  return EnterPhase(Phase::kInit);
}

bool ControlPlane::NotifySignal() {
  FailureDetector* const detector = g_detector.load();
  if (detector != nullptr) detector->NotifySignal();
  return detector != nullptr;
}

absl::Status ControlPlane::JobStatus() const {
  return detector_ == nullptr ? absl::OkStatus() : detector_->status();
}

namespace {
absl::Status InjectedError() { return absl::InternalError("an error that a test asked for"); }
}  // namespace

absl::Status ControlPlane::EnterPhase(Phase phase) {
  if (recorder_ != nullptr && recorder_->SetPhase(phase)) return InjectedError();
  return JobStatus();
}

absl::Status ControlPlane::BeginStep(Phase phase, int64_t step, int stage) {
  if (recorder_ != nullptr && recorder_->BeginStep(phase, step, stage)) return InjectedError();
  return JobStatus();
}

void ControlPlane::EndStep() {
  if (recorder_ != nullptr) recorder_->EndStep();
}

void ControlPlane::Broadcast(std::string* bytes, int root) {
  CHECK(root >= 0 && root < size_) << "root " << root;
  if (size_ == 1) return;
  FlightRecorder::Scope scope(recorder_.get(), CommOp::kBroadcast, 0,
                              rank_ == root ? static_cast<int64_t>(bytes->size()) : -1);
  BroadcastBytes(bytes, root);
  scope.SetBytes(static_cast<int64_t>(bytes->size()));
}

void ControlPlane::BroadcastBytes(std::string* bytes, int root) {
  // The size travels with the first bytes, so that a small message is one collective.
  struct Packet {
    int64_t size;
    char data[1024 - sizeof(int64_t)];
  } packet;
  if (rank_ == root) {
    packet.size = static_cast<int64_t>(bytes->size());
    std::memcpy(packet.data, bytes->data(), std::min(bytes->size(), sizeof(packet.data)));
  }
  MPI_CHECK(MPI_Bcast(&packet, sizeof(packet), MPI_BYTE, root, impl_->collectives));
  const size_t total = static_cast<size_t>(packet.size);
  size_t done = std::min(total, sizeof(packet.data));
  if (rank_ != root) {
    bytes->resize(total);
    std::memcpy(bytes->data(), packet.data, done);
  }
  constexpr size_t kPiece = size_t{1} << 30;  // MPI counts are ints
  for (; done < total; done += std::min(kPiece, total - done)) {
    MPI_CHECK(MPI_Bcast(bytes->data() + done, IntCount(std::min(kPiece, total - done)), MPI_BYTE,
                        root, impl_->collectives));
  }
}

namespace {

// Sizes and displacements of a Gatherv / Allgatherv of strings.
struct Layout {
  explicit Layout(int ranks) : sizes(ranks), offsets(ranks) {}
  void Place() {
    size_t total = 0;
    for (size_t r = 0; r < sizes.size(); ++r) {
      offsets[r] = IntCount(total);
      total += static_cast<size_t>(sizes[r]);
    }
    all.resize(static_cast<size_t>(IntCount(total)));
  }
  std::vector<std::string> Cut() const {
    std::vector<std::string> parts;
    for (size_t r = 0; r < sizes.size(); ++r) {
      parts.emplace_back(all, static_cast<size_t>(offsets[r]), static_cast<size_t>(sizes[r]));
    }
    return parts;
  }
  std::vector<int> sizes, offsets;
  std::string all;
};

}  // namespace

std::vector<std::string> ControlPlane::Gather(const std::string& bytes, int root) {
  CHECK(root >= 0 && root < size_) << "root " << root;
  if (size_ == 1) return {bytes};
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kGather, 0,
                                    static_cast<int64_t>(bytes.size()));
  const int mine = IntCount(bytes.size());
  Layout layout(rank_ == root ? size_ : 0);
  MPI_CHECK(
      MPI_Gather(&mine, 1, MPI_INT, layout.sizes.data(), 1, MPI_INT, root, impl_->collectives));
  layout.Place();
  MPI_CHECK(MPI_Gatherv(bytes.data(), mine, MPI_BYTE, layout.all.data(), layout.sizes.data(),
                        layout.offsets.data(), MPI_BYTE, root, impl_->collectives));
  return layout.Cut();
}

std::vector<std::string> ControlPlane::AllGather(const std::string& bytes) {
  if (size_ == 1) return {bytes};
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kAllGather, 0,
                                    static_cast<int64_t>(bytes.size()));
  const int mine = IntCount(bytes.size());
  Layout layout(size_);
  MPI_CHECK(MPI_Allgather(&mine, 1, MPI_INT, layout.sizes.data(), 1, MPI_INT, impl_->collectives));
  layout.Place();
  MPI_CHECK(MPI_Allgatherv(bytes.data(), mine, MPI_BYTE, layout.all.data(), layout.sizes.data(),
                           layout.offsets.data(), MPI_BYTE, impl_->collectives));
  return layout.Cut();
}

void ControlPlane::Barrier() {
  if (size_ == 1) return;
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kBarrier, 0, 0);
  MPI_CHECK(MPI_Barrier(impl_->collectives));
}

absl::Status ControlPlane::Agree(const absl::Status& status) {
  // After a failure nobody comes to an agreement any more.
  RETURN_IF_ERROR(JobStatus());
  if (size_ == 1) return status;
  if (detector_ != nullptr && !status.ok()) detector_->SetError(status);
  const absl::Status agreed = AgreeOnStatus(status);
  agreed_on_error_ = !agreed.ok();
  if (detector_ != nullptr && !status.ok()) detector_->SetError(absl::OkStatus());
  return agreed;
}

// Rank 0 will print it and would not know whose it is.
absl::Status ControlPlane::WithRank(const absl::Status& status) const {
  if (recorder_ == nullptr || rank_ == 0) return status;
  absl::Status named(status.code(),
                     absl::StrCat("rank ", rank_, " (", host_, ") in ",
                                  Name(recorder_->State().phase), ": ", status.message()));
  status.ForEachPayload(
      [&named](absl::string_view url, const absl::Cord& value) { named.SetPayload(url, value); });
  return named;
}

absl::Status ControlPlane::AgreeOnStatus(const absl::Status& status) {
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kAgree, 0,
                                    static_cast<int64_t>(status.message().size()));
  int failing = status.ok() ? size_ : rank_;
  MPI_CHECK(MPI_Allreduce(MPI_IN_PLACE, &failing, 1, MPI_INT, MPI_MIN, impl_->collectives));
  if (failing == size_) return absl::OkStatus();
  std::string packed;
  if (rank_ == failing) packed = PackStatus(WithRank(status));
  BroadcastBytes(&packed, failing);
  return UnpackStatus(packed);
}

void ControlPlane::Send(int peer, int channel, const std::string& bytes) {
  CHECK(peer >= 0 && peer < size_) << "peer " << peer;
  CHECK_GE(channel, 0);
  const std::lock_guard lock(impl_->mutex);
  impl_->ReapSends();
  if (peer == rank_) {
    impl_->to_self[channel].push_back(bytes);
    return;
  }
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kPost, 0,
                                    static_cast<int64_t>(bytes.size()), peer);
  auto& spare = impl_->spare;
  if (spare.empty()) spare.emplace_back();
  const auto send = spare.begin();
  send->bytes.assign(bytes);
  MPI_CHECK(MPI_Isend(send->bytes.data(), IntCount(send->bytes.size()), MPI_BYTE, peer, channel,
                      impl_->messages, &send->request));
  impl_->pending.splice(impl_->pending.end(), spare, send);
}

bool ControlPlane::TryReceive(int peer, int channel, std::string* bytes) {
  const bool found = Poll(peer, channel, bytes);
  // A look that finds nothing is no call.
  if (found && peer != rank_) {
    const FlightRecorder::Scope scope(recorder_.get(), CommOp::kReceive, 0,
                                      static_cast<int64_t>(bytes->size()), peer);
  }
  return found;
}

bool ControlPlane::Poll(int peer, int channel, std::string* bytes) {
  CHECK(peer >= 0 && peer < size_) << "peer " << peer;
  const std::lock_guard lock(impl_->mutex);
  if (!impl_->pending.empty()) impl_->ReapSends();
  if (peer == rank_) {
    auto& queue = impl_->to_self[channel];
    if (queue.empty()) return false;
    *bytes = std::move(queue.front());
    queue.pop_front();
    return true;
  }
  int found = 0;
  MPI_Message message;
  MPI_Status status;
  MPI_CHECK(MPI_Improbe(peer, channel, impl_->messages, &found, &message, &status));
  if (!found) return false;
  int count = 0;
  MPI_CHECK(MPI_Get_count(&status, MPI_BYTE, &count));
  bytes->resize(static_cast<size_t>(count));
  MPI_CHECK(MPI_Mrecv(bytes->data(), count, MPI_BYTE, &message, MPI_STATUS_IGNORE));
  return true;
}

void ControlPlane::Receive(int peer, int channel, std::string* bytes) {
  FlightRecorder::Scope scope(peer == rank_ ? nullptr : recorder_.get(), CommOp::kReceive, 0,
                              /*bytes=*/-1, peer);
  for (Backoff backoff;; backoff.Pause()) {
    if (Poll(peer, channel, bytes)) {
      scope.SetBytes(static_cast<int64_t>(bytes->size()));
      return;
    }
    CHECK(peer != rank_) << "nothing was sent to channel " << channel << " of this rank itself";
  }
}

void ControlPlane::FlushSends() {
  if (impl_->pending.empty()) return;
  const FlightRecorder::Scope scope(recorder_.get(), CommOp::kFlush, 0, 0);
  for (Backoff backoff;; backoff.Pause()) {
    const std::lock_guard lock(impl_->mutex);
    impl_->ReapSends();
    if (impl_->pending.empty()) return;
  }
}

void ControlPlane::Abort(int exit_code, const std::string& why) {
  std::fflush(nullptr);
  if (detector_ != nullptr) detector_->Fail(why.empty() ? "ended the job" : why, exit_code);
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::abort();
}

}  // namespace trireme
