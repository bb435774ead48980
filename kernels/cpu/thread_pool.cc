#include "kernels/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/check.h"

namespace trireme::cpu {
namespace {

// Ops of a step follow one another within microseconds: a worker looks for the next loop that long
// before it sleeps. 2000 rounds of 16 pauses are about 100 us to 1 ms (a pause is 4 to 140 cycles);
// every 32nd round yields the core.
constexpr int kSpinRounds = 2000;

inline void Pause() {
#if defined(__x86_64__)
  for (int i = 0; i < 16; ++i) __builtin_ia32_pause();
#elif defined(__aarch64__)
  for (int i = 0; i < 16; ++i) asm volatile("yield");
#endif
}

struct ScratchMemory {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchMemory() { std::free(data); }
};

}  // namespace

void* Scratch(size_t bytes) {
  thread_local ScratchMemory memory;
  if (bytes > memory.bytes) {
    std::free(memory.data);
    memory.bytes = (std::max(bytes, size_t{1} << 16) + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(64, memory.bytes);
    CHECK(memory.data != nullptr) << "no memory for " << memory.bytes << " bytes of scratch";
  }
  return memory.data;
}

ThreadPool::ThreadPool(int threads) {
  CHECK_GE(threads, 1);
  workers_.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { WorkerMain(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(Function call, void* context, int64_t n, int64_t grain) {
  std::unique_lock<std::mutex> lock(caller_, std::defer_lock);
  if (n <= grain || workers_.empty() || !lock.try_lock()) {
    call(context, 0, n);
    return;
  }
  loop_ = {call, context, n, grain};
  next_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  epoch_.notify_all();
  TakeChunks();
  // Closed first: a worker that wakes only now finds nothing to enter, and only those inside are
  // waited for.
  uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  for (int round = 0; state != 0; ++round) {
    Pause();
    if (round % 32 == 31) sched_yield();
    state = state_.load(std::memory_order_acquire);
  }
}

void ThreadPool::TakeChunks() {
  const Loop loop = loop_;
  for (;;) {
    const int64_t begin = next_.fetch_add(loop.grain, std::memory_order_relaxed);
    if (begin >= loop.n) return;
    loop.call(loop.context, begin, std::min(loop.n, begin + loop.grain));
  }
}

bool ThreadPool::Enter(uint32_t state) {
  while ((state & kOpen) != 0) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

void ThreadPool::WorkerMain() {
  uint32_t seen = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    for (int round = 0; epoch == seen && round < kSpinRounds; ++round) {
      Pause();
      if (round % 32 == 31) sched_yield();
      epoch = epoch_.load(std::memory_order_acquire);
    }
    if (epoch == seen) {
      epoch_.wait(seen, std::memory_order_acquire);
      continue;
    }
    seen = epoch;
    if (Enter(state_.load(std::memory_order_acquire))) {
      TakeChunks();
      state_.fetch_sub(1, std::memory_order_release);
    }
  }
}

}  // namespace trireme::cpu
