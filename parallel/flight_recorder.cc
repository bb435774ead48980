#include "parallel/flight_recorder.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"

namespace trireme {
namespace {

constexpr uint64_t kMagic = 0x5452494d464c5432;  // "TRIMFLT2"

// Everything in the shared memory is a word that is read and written whole.
using Word = std::atomic<uint64_t>;
static_assert(Word::is_always_lock_free, "records must work between processes");

uint64_t Bits(int64_t value) { return static_cast<uint64_t>(value); }
int64_t Signed(uint64_t value) { return static_cast<int64_t>(value); }

// Threads of a rank that are in calls at the same time; more are not seen to wait.
constexpr int kOpenCalls = 4;

// op, group, stage and peer of a record in one word.
uint64_t PackCall(CommOp op, int group, int stage, int peer) {
  return static_cast<uint64_t>(op) | static_cast<uint64_t>(group & 0xff) << 8 |
         static_cast<uint64_t>(stage & 0xffff) << 16 | static_cast<uint64_t>(uint32_t(peer)) << 32;
}

FlightRecord Unpack(uint64_t call) {
  FlightRecord record;
  record.op = static_cast<CommOp>(call & 0xff);
  record.group = static_cast<int32_t>(call >> 8 & 0xff);
  record.stage = static_cast<int32_t>(call >> 16 & 0xffff);
  record.peer = static_cast<int32_t>(call >> 32);
  return record;
}

}  // namespace

// A record is valid while `version` is twice its sequence, before and after reading it (a seqlock:
// Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012). The fields
// are stored with release and loaded with acquire, so that who sees a new field sees the new
// version too; on x86 that costs nothing.
// A writer that is held up for as long as others need for 1,024 calls spoils the record that has
// taken its place: then `version` fits neither.
struct alignas(64) FlightRecorder::Slot {
  Word version, call, bytes, micro_batch, group_sequence, entered_ns, completed_ns;
};

struct FlightRecorder::Log {
  Word magic, rank, phase, step, micro_batch, stage, steps_done, outside, sequence, calls_done,
      num_groups, thread;
  // Calls under way, one a thread; a call may take longer than its record lasts.
  struct Open {
    Word sequence, call, bytes, micro_batch, group_sequence, entered_ns;
  } open[kOpenCalls];
  struct Group {
    Word name, first, stride, size, entered;
  } groups[kMaxCommGroups];
  Slot slots[kRecords];
};

namespace {

template <typename LogType>
LogType* MapLog(int fd, int protection) {
  void* memory = mmap(nullptr, sizeof(LogType), protection, MAP_SHARED, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<LogType*>(memory);
}

}  // namespace

const char* Name(Phase phase) {
  switch (phase) {
    case Phase::kInit:
      return "init";
    case Phase::kLoad:
      return "load";
    case Phase::kCapture:
      return "capture";
    case Phase::kPrefill:
      return "prefill";
    case Phase::kDecode:
      return "decode";
    case Phase::kSearch:
      return "search";
    case Phase::kShutdown:
      return "shutdown";
  }
  return "?";
}

const char* Name(CommOp op) {
  switch (op) {
    case CommOp::kAllReduce:
      return "all_reduce";
    case CommOp::kAllGather:
      return "all_gather";
    case CommOp::kBroadcast:
      return "broadcast";
    case CommOp::kGather:
      return "gather";
    case CommOp::kBarrier:
      return "barrier";
    case CommOp::kAgree:
      return "agree";
    case CommOp::kSplit:
      return "split";
    case CommOp::kFree:
      return "free";
    case CommOp::kFinalize:
      return "finalize";
    case CommOp::kSend:
      return "send";
    case CommOp::kWaitSend:
      return "wait_send";
    case CommOp::kRecv:
      return "recv";
    case CommOp::kPost:
      return "post";
    case CommOp::kReceive:
      return "receive";
    case CommOp::kFlush:
      return "flush";
  }
  return "?";
}

bool CommGroup::Contains(int rank) const {
  const int distance = rank - first;
  return distance >= 0 && distance % stride == 0 && distance / stride < size;
}

std::string Describe(const CommGroup& group) {
  const std::string name(group.name.data(), strnlen(group.name.data(), group.name.size()));
  if (name == "world") return name;
  if (group.stride == 1 && group.size > 1)
    return absl::StrCat(name, " ", group.first, "-", group.RankOf(group.size - 1));
  std::string out = absl::StrCat(name, " ");
  for (int i = 0; i < group.size; ++i) absl::StrAppend(&out, i == 0 ? "" : ",", group.RankOf(i));
  return out;
}

int64_t MonotonicNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

FlightRecorder::FlightRecorder(Log* log, int memory_fd, bool writes)
    : log_(log), memory_fd_(memory_fd), writes_(writes) {}

FlightRecorder::~FlightRecorder() {
  munmap(log_, sizeof(Log));
  if (memory_fd_ >= 0) close(memory_fd_);
}

absl::StatusOr<std::unique_ptr<FlightRecorder>> FlightRecorder::Create(int rank) {
  const int fd = memfd_create("trireme-flight-recorder", MFD_CLOEXEC);
  Log* log = nullptr;
  if (fd >= 0 && ftruncate(fd, sizeof(Log)) == 0) log = MapLog<Log>(fd, PROT_READ | PROT_WRITE);
  if (log == nullptr) {
    const int error = errno;
    if (fd >= 0) close(fd);
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", sizeof(Log) >> 10,
                     " KiB of memory for the flight recorder: ", std::strerror(error)));
  }
  // All zero is a valid log; the words begin their lives here.
  new (log) Log{};
  log->rank.store(Bits(rank));
  log->step.store(Bits(-1));
  log->micro_batch.store(Bits(-1));
  log->magic.store(kMagic);
  return std::unique_ptr<FlightRecorder>(new FlightRecorder(log, fd, /*writes=*/true));
}

absl::StatusOr<std::unique_ptr<const FlightRecorder>> FlightRecorder::Map(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || info.st_size != static_cast<off_t>(sizeof(Log))) {
    if (fd >= 0) close(fd);
    return absl::NotFoundError(absl::StrCat(path, ": no flight recorder"));
  }
  Log* log = MapLog<Log>(fd, PROT_READ);
  close(fd);
  if (log == nullptr || log->magic.load() != kMagic) {
    if (log != nullptr) munmap(log, sizeof(Log));
    return absl::NotFoundError(absl::StrCat(path, ": no flight recorder"));
  }
  return std::unique_ptr<const FlightRecorder>(new FlightRecorder(log, -1, /*writes=*/false));
}

int FlightRecorder::AddGroup(const CommGroup& group) {
  CHECK(writes_);
  // Communicators come and go in tests and benches; the same ranks keep their index.
  const int known = static_cast<int>(log_->num_groups.load(std::memory_order_relaxed));
  uint64_t name = 0;
  std::memcpy(&name, group.name.data(), sizeof(name));
  for (int i = 0; i < known; ++i) {
    const Log::Group& old = log_->groups[i];
    if (old.name.load() == name && old.first.load() == Bits(group.first) &&
        old.stride.load() == Bits(group.stride) && old.size.load() == Bits(group.size))
      return i;
  }
  CHECK_LT(known, kMaxCommGroups) << "groups of one rank";
  Log::Group& added = log_->groups[known];
  added.name.store(name);
  added.first.store(Bits(group.first));
  added.stride.store(Bits(group.stride));
  added.size.store(Bits(group.size));
  log_->num_groups.store(static_cast<uint64_t>(known) + 1, std::memory_order_release);
  return known;
}

int FlightRecorder::writing_thread() const {
  return static_cast<int>(log_->thread.load(std::memory_order_acquire));
}

bool FlightRecorder::SetPhase(Phase phase) {
  static thread_local const pid_t thread = gettid();
  log_->thread.store(static_cast<uint64_t>(thread), std::memory_order_release);
  log_->phase.store(static_cast<uint64_t>(phase), std::memory_order_release);
  return AtFaultPoint(nullptr);
}

bool FlightRecorder::BeginStep(Phase phase, int64_t step, int stage) {
  log_->micro_batch.store(Bits(step), std::memory_order_relaxed);
  log_->stage.store(Bits(stage), std::memory_order_relaxed);
  log_->step.store(Bits(step), std::memory_order_release);
  return SetPhase(phase);
}

bool FlightRecorder::AtFaultPoint(const char* op) {
  if (trireme_fault_point == nullptr) [[likely]]
    return false;
  const Phase phase = static_cast<Phase>(log_->phase.load(std::memory_order_relaxed));
  return trireme_fault_point(static_cast<int>(log_->rank.load(std::memory_order_relaxed)),
                             Name(phase), Signed(log_->micro_batch.load(std::memory_order_relaxed)),
                             op);
}

void FlightRecorder::EndStep() {
  log_->micro_batch.store(Bits(-1), std::memory_order_relaxed);
  log_->steps_done.fetch_add(1, std::memory_order_release);
}

void FlightRecorder::GoOutside() { log_->outside.fetch_add(1, std::memory_order_release); }
void FlightRecorder::ComeBack() { log_->outside.fetch_sub(1, std::memory_order_release); }

void FlightRecorder::AtFaultPoint(CommOp op) {
  if (trireme_fault_point != nullptr) [[unlikely]]
    AtFaultPoint(Name(op));
}

CommCall FlightRecorder::Now(CommCall call) const {
  call.micro_batch = Signed(log_->micro_batch.load(std::memory_order_relaxed));
  call.stage = static_cast<int>(log_->stage.load(std::memory_order_relaxed));
  return call;
}

FlightRecorder::OpenCall FlightRecorder::Enter(const CommCall& made) {
  constexpr auto kOrder = std::memory_order_release;
  constexpr auto kRelaxed = std::memory_order_relaxed;
  OpenCall mine{.sequence = log_->sequence.fetch_add(1, kOrder) + 1};
  const uint64_t call = PackCall(made.op, made.group, made.stage, made.peer);
  const uint64_t group_sequence =
      IsCollective(made.op) ? log_->groups[made.group].entered.fetch_add(1, kOrder) + 1 : 0;
  const uint64_t now = Bits(MonotonicNs());
  Slot& slot = log_->slots[(mine.sequence - 1) % kRecords];
  slot.version.store(2 * mine.sequence - 1, kRelaxed);
  slot.call.store(call, kOrder);
  slot.bytes.store(Bits(made.bytes), kOrder);
  slot.micro_batch.store(Bits(made.micro_batch), kOrder);
  slot.group_sequence.store(group_sequence, kOrder);
  slot.entered_ns.store(now, kOrder);
  slot.completed_ns.store(0, kOrder);
  slot.version.store(2 * mine.sequence, kOrder);
  for (int i = 0; i < kOpenCalls && mine.place < 0; ++i) {
    Log::Open& open = log_->open[i];
    uint64_t nobody = 0;
    // Odd while it is written; the sequence comes last.
    if (open.sequence.load(kRelaxed) != 0 ||
        !open.sequence.compare_exchange_strong(nobody, 2 * mine.sequence + 1))
      continue;
    open.call.store(call, kOrder);
    open.bytes.store(Bits(made.bytes), kOrder);
    open.micro_batch.store(Bits(made.micro_batch), kOrder);
    open.group_sequence.store(group_sequence, kOrder);
    open.entered_ns.store(now, kOrder);
    open.sequence.store(2 * mine.sequence, kOrder);
    mine.place = i;
  }
  return mine;
}

void FlightRecorder::Complete(const OpenCall& call) {
  Slot& slot = log_->slots[(call.sequence - 1) % kRecords];
  if (slot.version.load(std::memory_order_relaxed) == 2 * call.sequence)
    slot.completed_ns.store(Bits(MonotonicNs()), std::memory_order_release);
  if (call.place >= 0) log_->open[call.place].sequence.store(0, std::memory_order_release);
  log_->calls_done.fetch_add(1, std::memory_order_release);
}

void FlightRecorder::SetBytes(const OpenCall& call, int64_t bytes) {
  Slot& slot = log_->slots[(call.sequence - 1) % kRecords];
  if (slot.version.load(std::memory_order_relaxed) == 2 * call.sequence)
    slot.bytes.store(Bits(bytes), std::memory_order_release);
}

// The newest call that is under way.
bool FlightRecorder::ReadOpen(FlightRecord* record) const {
  constexpr auto kOrder = std::memory_order_acquire;
  bool found = false;
  for (const Log::Open& open : log_->open) {
    const uint64_t sequence = open.sequence.load(kOrder);
    if (sequence == 0 || sequence % 2 != 0 || sequence / 2 <= record->sequence) continue;
    FlightRecord one = Unpack(open.call.load(kOrder));
    one.sequence = sequence / 2;
    one.bytes = Signed(open.bytes.load(kOrder));
    one.micro_batch = Signed(open.micro_batch.load(kOrder));
    one.group_sequence = open.group_sequence.load(kOrder);
    one.entered_ns = Signed(open.entered_ns.load(kOrder));
    if (open.sequence.load(std::memory_order_relaxed) != sequence) continue;
    *record = one;
    found = true;
  }
  return found;
}

bool FlightRecorder::Read(uint64_t sequence, FlightRecord* record) const {
  const Slot& slot = log_->slots[(sequence - 1) % kRecords];
  constexpr auto kOrder = std::memory_order_acquire;
  if (slot.version.load(kOrder) != 2 * sequence) return false;
  *record = Unpack(slot.call.load(kOrder));
  record->sequence = sequence;
  record->bytes = Signed(slot.bytes.load(kOrder));
  record->micro_batch = Signed(slot.micro_batch.load(kOrder));
  record->group_sequence = slot.group_sequence.load(kOrder);
  record->entered_ns = Signed(slot.entered_ns.load(kOrder));
  record->completed_ns = Signed(slot.completed_ns.load(kOrder));
  return slot.version.load(std::memory_order_relaxed) == 2 * sequence;
}

RankState FlightRecorder::State() const {
  constexpr auto kOrder = std::memory_order_acquire;
  RankState state;
  state.rank = static_cast<int32_t>(log_->rank.load(kOrder));
  state.phase = static_cast<Phase>(log_->phase.load(kOrder));
  state.outside = log_->outside.load(kOrder) != 0;
  state.step = Signed(log_->step.load(kOrder));
  state.steps_done = Signed(log_->steps_done.load(kOrder));
  state.calls_done = log_->calls_done.load(kOrder);
  state.in_call = ReadOpen(&state.last);
  // Else the newest record; the very newest may be half written.
  const uint64_t newest = log_->sequence.load(kOrder);
  for (uint64_t back = 0; !state.in_call && back < 4 && back < newest; ++back) {
    if (Read(newest - back, &state.last)) break;
    state.last = {};
  }
  if (state.last.sequence > 0) state.last_age_ns = MonotonicNs() - state.last.entered_ns;
  state.num_groups = static_cast<int32_t>(log_->num_groups.load(kOrder));
  for (int i = 0; i < state.num_groups; ++i) {
    const Log::Group& group = log_->groups[i];
    const uint64_t name = group.name.load(kOrder);
    std::memcpy(state.groups[i].name.data(), &name, sizeof(name));
    state.groups[i].first = static_cast<int32_t>(group.first.load(kOrder));
    state.groups[i].stride = static_cast<int32_t>(group.stride.load(kOrder));
    state.groups[i].size = static_cast<int32_t>(group.size.load(kOrder));
    state.entered[i] = group.entered.load(kOrder);
  }
  return state;
}

std::vector<FlightRecord> FlightRecorder::Records() const {
  const uint64_t newest = log_->sequence.load(std::memory_order_acquire);
  const uint64_t oldest = newest > kRecords ? newest - kRecords + 1 : 1;
  std::vector<FlightRecord> records;
  records.reserve(newest - oldest + 1);
  FlightRecord record;
  for (uint64_t sequence = oldest; sequence <= newest; ++sequence) {
    if (Read(sequence, &record)) records.push_back(record);
  }
  return records;
}

std::string FlightRecorder::ToJson(const std::string& host) const {
  const RankState state = State();
  const int64_t now = MonotonicNs();
  nlohmann::ordered_json out;
  out["rank"] = state.rank;
  out["host"] = host;
  out["phase"] = Name(state.phase);
  out["step"] = state.step;
  out["steps_done"] = state.steps_done;
  out["records"] = nlohmann::ordered_json::array();
  for (const FlightRecord& record : Records()) {
    nlohmann::ordered_json line;
    line["sequence"] = record.sequence;
    line["op"] = Name(record.op);
    if (record.group < state.num_groups) line["group"] = Describe(state.groups[record.group]);
    if (record.group_sequence > 0) line["group_sequence"] = record.group_sequence;
    if (record.peer >= 0) line["peer"] = record.peer;
    line["bytes"] = record.bytes;
    line["stage"] = record.stage;
    line["micro_batch"] = record.micro_batch;
    line["entered_us_ago"] = (now - record.entered_ns) / 1000;
    if (record.completed_ns > 0) {
      line["completed_us_ago"] = (now - record.completed_ns) / 1000;
    } else {
      line["completed_us_ago"] = nullptr;
    }
    out["records"].push_back(std::move(line));
  }
  // Records one a line, for grep.
  const std::string text = out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return absl::StrCat(absl::StrReplaceAll(text, {{"{\"sequence\"", "\n{\"sequence\""}}), "\n");
}

absl::Status WriteTextFile(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  size_t written = 0;
  int error = fd < 0 ? errno : 0;
  while (error == 0 && written < text.size()) {
    const ssize_t n = write(fd, text.data() + written, text.size() - written);
    if (n > 0) {
      written += static_cast<size_t>(n);
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (fd >= 0 && close(fd) != 0 && error == 0) error = errno;
  if (error == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", std::strerror(error)));
}

}  // namespace trireme
