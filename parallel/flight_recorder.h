// What a rank is doing, readable while it does it and after it has died: the phase, the step, and a
// ring of its last 1,024 calls that other ranks take part in. Threads of the rank write,
// without locks (< 200 ns a call); any thread reads, and never sees half a record. The ring lies in
// a memfd: no name anywhere, gone with the last process that maps it, so that ranks of the same
// host can map each other's and still read one whose owner was killed.
//
// Written by Communicator, ControlPlane and whoever runs steps; read by the failure detector.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

enum class Phase : uint8_t {
  kInit,     // MPI is up, nothing is loaded
  kLoad,     // weights
  kCapture,  // graphs, on devices that have them
  kPrefill,  // a step with prompt tokens
  kDecode,   // a step without
  kSearch,   // of retrieval: a step is a batch of queries
  kShutdown
};
const char* Name(Phase phase);

enum class CommOp : uint8_t {
  kAllReduce,
  kAllGather,
  kBroadcast,
  kGather,
  kBarrier,
  kAgree,     // all ranks agree on a status
  kSplit,     // a communicator is made
  kFree,      // and given back
  kFinalize,  // MPI_Finalize
  kSend,      // between two ranks from here on
  kWaitSend,
  kRecv,
  kPost,     // ControlPlane::Send
  kReceive,  // ControlPlane::Receive
  kFlush     // waits for everything posted
};
const char* Name(CommOp op);
inline bool IsCollective(CommOp op) { return op <= CommOp::kFinalize; }

// World ranks first, first + stride, ...: `size` of them.
struct CommGroup {
  std::array<char, 8> name{};  // "world", "tp", "pp"; ends with 0
  int32_t first = 0, stride = 1, size = 1;

  bool Contains(int rank) const;
  int RankOf(int index) const { return first + index * stride; }
  bool operator==(const CommGroup&) const = default;
};
// "tp 2-3", "pp 0,2", "world".
std::string Describe(const CommGroup& group);

// A call as its rank makes it.
struct CommCall {
  CommOp op = CommOp::kBarrier;
  int group = 0;      // as of AddGroup
  int64_t bytes = 0;  // -1 = not known yet
  int peer = -1;      // world rank
  int64_t micro_batch =
      -1;  // of the step that is being run; FlightRecorder::Now fills in these two
  int stage = 0;
};

struct FlightRecord {
  uint64_t sequence = 0;  // of this rank's records, from 1
  CommOp op = CommOp::kBarrier;
  int32_t group = 0;            // index into the recorder's groups
  int32_t stage = 0;            // pipeline stage
  int32_t peer = -1;            // world rank of the other side, -1 for a collective
  int64_t bytes = 0;            // of this rank's input or message; -1 = not known yet
  int64_t micro_batch = -1;     // step of the plan; -1 outside of steps
  uint64_t group_sequence = 0;  // of the group's collectives, from 1, the same on all its ranks
  int64_t entered_ns = 0;       // CLOCK_MONOTONIC of the host
  int64_t completed_ns = 0;     // 0 = not yet
};

inline constexpr int kMaxCommGroups = 8;

// A rank at one moment. Copied as bytes between ranks.
struct RankState {
  int32_t rank = 0;
  Phase phase = Phase::kInit;
  bool in_call = false;    // `last` is not completed
  bool outside = false;    // waits for something that is no rank: a reader of its output, a request
  int64_t step = -1;       // begun last
  int64_t steps_done = 0;  // finished so far
  uint64_t calls_done = 0;  // records completed so far
  FlightRecord last;        // a call under way, else the newest; meaningful when sequence > 0
  int64_t last_age_ns = 0;  // since last was entered
  int32_t num_groups = 0;
  std::array<CommGroup, kMaxCommGroups> groups{};
  std::array<uint64_t, kMaxCommGroups> entered{};  // group_sequence of the last collective entered
};

class FlightRecorder {
 public:
  static constexpr int kRecords = 1024;

  // One that this rank writes. ResourceExhausted when the host gives no memory for it.
  static absl::StatusOr<std::unique_ptr<FlightRecorder>> Create(int rank);
  // Another process's, for reading; `path` is /proc/PID/fd/N of its memory_fd(). NotFound when it
  // cannot be mapped: another host, or not our user's.
  static absl::StatusOr<std::unique_ptr<const FlightRecorder>> Map(const std::string& path);
  ~FlightRecorder();
  FlightRecorder(const FlightRecorder&) = delete;
  FlightRecorder& operator=(const FlightRecorder&) = delete;

  int memory_fd() const { return memory_fd_; }

  // --- Threads of the rank. Collectives of one group: one thread at a time. ---
  // Gives the group's index; a group that is known already keeps its own.
  int AddGroup(const CommGroup& group);
  // Both are true when a test wants the caller to fail.
  bool SetPhase(Phase phase);
  bool BeginStep(Phase phase, int64_t step, int stage);
  void EndStep();

  // During its lifetime a thread of the rank waits for something that is no rank. `recorder` may be
  // null.
  class Outside {
   public:
    explicit Outside(FlightRecorder* recorder) : recorder_(recorder) {
      if (recorder_ != nullptr) recorder_->GoOutside();
    }
    ~Outside() {
      if (recorder_ != nullptr) recorder_->ComeBack();
    }
    Outside(const Outside&) = delete;
    Outside& operator=(const Outside&) = delete;

   private:
    FlightRecorder* recorder_;
  };

  struct OpenCall {
    uint64_t sequence = 0;
    int place = -1;  // in the table of open calls
  };
  // The call with the step that is run now.
  CommCall Now(CommCall call) const;
  // Of calls that are made at once a Scope takes care; see parallel/enqueued_calls.h for others.
  OpenCall Enter(const CommCall& call);
  void Complete(const OpenCall& call);
  // From construction to destruction of the scope one call is under way. A null recorder records
  // nothing.
  class Scope {
   public:
    Scope(FlightRecorder* recorder, CommOp op, int group, int64_t bytes, int peer = -1)
        : recorder_(recorder) {
      if (recorder_ == nullptr) return;
      call_ = recorder_->Enter(recorder_->Now({op, group, bytes, peer}));
      recorder_->AtFaultPoint(op);
    }
    ~Scope() {
      if (recorder_ != nullptr) recorder_->Complete(call_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    void SetBytes(int64_t bytes) {
      if (recorder_ != nullptr) recorder_->SetBytes(call_, bytes);
    }

   private:
    FlightRecorder* recorder_;
    OpenCall call_;
  };

  // --- Any thread, any process. ---
  // The thread that has begun the latest phase or step, as of gettid(); 0 before the first.
  int writing_thread() const;
  RankState State() const;
  // Oldest first. Records that are overwritten meanwhile are left out.
  std::vector<FlightRecord> Records() const;
  // {"rank", "phase", "groups", "records": [...]}, times in microseconds before now.
  std::string ToJson(const std::string& host) const;

 private:
  struct Log;
  struct Slot;
  FlightRecorder(Log* log, int memory_fd, bool writes);
  void SetBytes(const OpenCall& call, int64_t bytes);
  void GoOutside();
  void ComeBack();
  bool AtFaultPoint(const char* op);
  void AtFaultPoint(CommOp op);
  bool ReadOpen(FlightRecord* record) const;
  bool Read(uint64_t sequence, FlightRecord* record) const;

  Log* log_;
  int memory_fd_;
  bool writes_;
};

// Writes text to path. One line naming the path when it fails.
absl::Status WriteTextFile(const std::string& path, const std::string& text);

int64_t MonotonicNs();

}  // namespace trireme

// A test's program may define it to make a rank fail: called when a phase or step begins (`op` is
// null then; true makes the caller return an error) and when a call is entered. Null in the
// product.
extern "C" [[gnu::weak]] bool trireme_fault_point(int rank, const char* phase, int64_t step,
                                                  const char* op);
