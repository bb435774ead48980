#include "tests/host_cuda/block_engine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <thread>

namespace host_cuda {
namespace {

// An A100's limit for a block, the smallest of the chips that the backend is for.
constexpr size_t kArena = 512 << 10, kSharedLimit = 163 << 10, kRedzone = 128;

std::string Where(const Loc& loc) {
  return std::string(loc.file_name()) + ":" + std::to_string(loc.line());
}

std::string NameOf(const CudaThread& t) {
  const auto triple = [](const auto& x) {
    return std::to_string(x.x) + "," + std::to_string(x.y) + "," + std::to_string(x.z);
  };
  return " (block " + triple(blockIdx) + " thread " + triple(t.tid) + ")";
}

}  // namespace

BlockEngine& BlockEngine::Get() {
  static thread_local BlockEngine engine;
  return engine;
}

BlockEngine::~BlockEngine() {
  if (arena_ != nullptr) UnmapMemory(arena_, kArena);
}

void BlockEngine::Prepare(const Config& config, const std::function<void()>* body,
                          const Options& options) {
  body_ = body;
  dynamic_bytes_ = config.dynamic_smem;
  dependent_ = config.dependent;
  options_ = options;
  if (stack_bytes_ != options.stack_bytes) threads_.clear();
  stack_bytes_ = options.stack_bytes;
  if (arena_ == nullptr) arena_ = MapMemory(kArena), used_ = kArena;
  scheduler_.Adopt();
  count_ = static_cast<int>(config.block.x * config.block.y * config.block.z);
  while (threads_.size() < static_cast<size_t>(count_)) {
    threads_.emplace_back().fiber.Allocate(stack_bytes_);
  }
  for (int i = 0; i < count_; ++i) {
    CudaThread& t = threads_[i];
    t.index = i, t.warp = i / 32, t.lane = i % 32;
    const unsigned u = i, bx = config.block.x, by = config.block.y;
    t.tid = uint3{u % bx, u / bx % by, u / (bx * by)};
  }
  // Fibers grow neither: ThreadSanitizer would see them move what belongs to all.
  ready_.reserve(count_);
  spinning_.reserve(count_);
  blockDim = config.block, gridDim = config.grid;
}

void BlockEngine::RunBlock(uint3 block, uint64_t seed) {
  rng_ = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  blockIdx = block;
  ResetShared();
  ready_.clear();
  spinning_.clear();
  live_ = count_;
  error_.clear();
  for (int i = 0; i < count_; ++i) {
    threads_[i].copies.clear(), threads_[i].groups.clear();
    threads_[i].waited = !dependent_;
    threads_[i].fiber.Start(&Entry);
    MakeReady(i);
  }
  OrderReady();
  Release(&start_);
  while (live_ > 0) {
    if (ready_.empty() && !Unblock()) {
      if (spinning_.empty()) Deadlock();
      ready_.swap(spinning_);
      std::this_thread::yield();
    }
    CudaThread& t = threads_[Pick()];
    current_ = &t;
    threadIdx = t.tid;
    Fiber::Switch(scheduler_, t.fiber);
    current_ = nullptr;
    if (!error_.empty()) throw KernelError(error_);
  }
  Acquire(&end_);
}

void BlockEngine::Entry() {
  BlockEngine& e = Get();
  e.current().fiber.Arrived(e.scheduler_);
  Acquire(&e.start_);
  (*e.body_)();
  Release(&e.end_);
  CudaThread& t = e.current();
  if (!t.copies.empty()) e.FailHere("exit with cp.async copies not waited for", Loc::current());
  if (!t.waited) e.FailHere("a dependent launch ends without WaitForPrevious", Loc::current());
  t.state = State::kDone;
  --e.live_;
  e.Yield();
}

void BlockEngine::Yield() {
  CudaThread& t = current();
  Fiber::Switch(t.fiber, scheduler_, t.state == State::kDone);
}

// Its turn comes again when nobody else of the block can run.
void BlockEngine::Spin() {
  spinning_.push_back(current().index);
  Yield();
}

void BlockEngine::Barrier(int id, int count, Loc loc) {
  CudaThread& t = current();
  if (id < 0 || id > 15) FailHere("there are barriers 0 to 15", loc);
  if (count % 32 != 0 || count > (count_ + 31) / 32 * 32)
    FailHere("a barrier is for whole warps of the block", loc);
  t.barrier_id = id, t.barrier_count = count, t.loc = loc;
  void* sync = &barrier_sync_[id * 2 + (barrier_phase_[id] & 1)];
  Release(sync);
  t.state = State::kBarrier;
  Yield();
  Acquire(sync);
}

void BlockEngine::Collective(CollectiveFn op, uint32_t mask, void* slot, Loc loc) {
  CudaThread& t = current();
  if ((mask >> t.lane & 1) == 0) FailHere("the calling lane is not in the mask", loc);
  t.op = op, t.mask = mask, t.slot = slot, t.loc = loc;
  t.state = State::kWarp;
  if (CompleteCollective(t)) {
    t.state = State::kReady;  // ran here; the others have been made ready
    return;
  }
  Yield();
}

void BlockEngine::WarpSync(uint32_t mask, Loc loc) {
  const int i = current().warp * 32 + std::countr_zero(mask | 1u << 31);
  void* sync = &warp_sync_[i * 2 + (warp_phase_[i] & 1)];
  Release(sync);
  Collective([](void** slots,
                uint32_t lanes) { ++*static_cast<uint8_t*>(slots[std::countr_zero(lanes)]); },
             mask, &warp_phase_[i], loc);
  Acquire(sync);
}

void BlockEngine::FailHere(const char* what, Loc loc) {
  error_ = std::string(what) + " at " + Where(loc) + NameOf(current());
  for (;;) Yield();  // RunBlock throws; this fiber is dropped
}

// --- shared memory ---

void* BlockEngine::StaticShared(const void* tag, size_t bytes) {
  for (auto& [known, address] : statics_) {
    if (known == tag) return address;
  }
  void* p = Take(bytes);
  if (p == nullptr) FailHere("more shared memory than the limit", Loc::current());
  statics_.emplace_back(tag, p);
  return p;
}

bool BlockEngine::InShared(const void* p, size_t bytes) const {
  const char* const at = static_cast<const char*>(p);
  return at >= arena_ && at + bytes <= arena_ + used_;
}

void* BlockEngine::Take(size_t bytes) {
  const size_t begin = (used_ + kRedzone + 127) & ~size_t{127};
  if (begin + bytes > kArena || (taken_ += bytes) > kSharedLimit) return nullptr;
  Unpoison(arena_ + begin, bytes);
  used_ = begin + bytes;
  return arena_ + begin;
}

void BlockEngine::ResetShared() {
  statics_.clear();
  Unpoison(arena_, used_);
  std::memset(arena_, 0xff, used_);  // NaN, -1: reads of what nobody wrote show
  used_ = taken_ = 0;
  Poison(arena_, kArena);
  dynamic_ = Take(dynamic_bytes_);
  if (dynamic_ == nullptr) throw KernelError("more dynamic shared memory than the limit");
}

// --- scheduling ---

uint32_t BlockEngine::Random(uint32_t n) {
  rng_ ^= rng_ << 13, rng_ ^= rng_ >> 7, rng_ ^= rng_ << 17;
  return static_cast<uint32_t>((rng_ >> 32) * n >> 32);
}
void BlockEngine::MakeReady(int index) {
  threads_[index].state = State::kReady;
  ready_.push_back(index);
}
void BlockEngine::OrderReady() {  // Pick takes from the back
  if (options_.order == Order::kForward) std::reverse(ready_.begin(), ready_.end());
}
int BlockEngine::Pick() {
  if (options_.order == Order::kShuffled) std::swap(ready_[Random(ready_.size())], ready_.back());
  const int index = ready_.back();
  ready_.pop_back();
  return index;
}

// True when every live lane of t's mask is in the same collective; then it has been executed and
// all lanes but t's own are ready.
bool BlockEngine::CompleteCollective(CudaThread& t) {
  void* slots[32] = {};
  uint32_t lanes = 0;
  const int first = t.warp * 32;
  for (uint32_t m = t.mask; m != 0; m &= m - 1) {
    const int lane = std::countr_zero(m);
    if (first + lane >= count_) continue;
    CudaThread& u = threads_[first + lane];
    if (u.state == State::kDone) continue;
    if (u.state != State::kWarp) return false;
    if (u.op != t.op || u.mask != t.mask) {
      error_ = "lanes of one warp meet in different collectives or masks: " + Where(t.loc) +
               NameOf(t) + " and " + Where(u.loc) + NameOf(u);
      return false;
    }
    slots[lane] = u.slot;
    lanes |= 1u << lane;
  }
  t.op(slots, lanes);
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int index = first + std::countr_zero(m);
    if (index != t.index) MakeReady(index);
  }
  return true;
}

// Lanes that waited for one that has exited.
bool BlockEngine::ReleaseWarps() {
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state == State::kWarp && CompleteCollective(threads_[i])) {
      MakeReady(i);
      return true;
    }
    if (!error_.empty()) throw KernelError(error_);
  }
  return false;
}

bool BlockEngine::ReleaseBarrier(int id) {
  int waiting = 0;
  const CudaThread* first = nullptr;
  for (int i = 0; i < count_; ++i) {
    const CudaThread& t = threads_[i];
    if (t.state != State::kBarrier || t.barrier_id != id) continue;
    ++waiting;
    if (first == nullptr) first = &t;
    if (id == 0 && t.loc.line() != first->loc.line()) return false;  // divergent
  }
  // Strict: threads that have exited are missed too.
  if (waiting == 0 || waiting != (first->barrier_count > 0 ? first->barrier_count : count_))
    return false;
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state == State::kBarrier && threads_[i].barrier_id == id) MakeReady(i);
  }
  ++barrier_phase_[id];
  OrderReady();
  return true;
}

// Called when no thread is ready.
bool BlockEngine::Unblock() {
  if (ReleaseWarps()) return true;
  for (int id = 0; id < 16; ++id) {
    if (ReleaseBarrier(id)) return true;
  }
  return false;
}

void BlockEngine::Deadlock() {
  std::vector<std::pair<std::string, int>> places;
  for (int i = 0; i < count_; ++i) {
    const CudaThread& t = threads_[i];
    const std::string place = t.state == State::kDone ? "exited" : Where(t.loc);
    const auto it = std::find_if(places.begin(), places.end(),
                                 [&](const auto& known) { return known.first == place; });
    if (it == places.end()) {
      places.emplace_back(place, 1);
    } else {
      ++it->second;
    }
  }
  std::string what =
      "divergent or missing barrier; threads of block " + std::to_string(blockIdx.x) + ":";
  for (const auto& [place, n] : places) what += " " + std::to_string(n) + " at " + place + ";";
  throw KernelError(what);
}

}  // namespace host_cuda
