// The threads of one CPU device. Ops call ParallelFor; small work runs on the caller alone. Which
// thread runs which chunk is left to chance, so a chunk's result must not depend on where the cuts
// lie.
//
// Own threads instead of OpenMP: ThreadSanitizer understands them, a device owns them, and a worker
// that the system has put aside never delays a loop whose chunks are all taken (ranks often
// outnumber cores).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace trireme::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller's thread counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end) for pieces of at most `grain` that cover [0, n) once. Any thread may
  // call; while one caller has the workers, others run their loops alone.
  template <typename Body>
  void ParallelFor(int64_t n, int64_t grain, Body&& body) {
    if (n <= 0) return;
    using Plain = std::remove_reference_t<Body>;
    const Function call = [](void* context, int64_t begin, int64_t end) {
      (*static_cast<Plain*>(context))(begin, end);
    };
    Run(call, const_cast<void*>(static_cast<const void*>(&body)), n, grain < 1 ? 1 : grain);
  }

 private:
  using Function = void (*)(void* context, int64_t begin, int64_t end);
  struct Loop {
    Function call = nullptr;
    void* context = nullptr;
    int64_t n = 0;
    int64_t grain = 1;
  };
  void Run(Function call, void* context, int64_t n, int64_t grain);
  void TakeChunks();
  void WorkerMain();
  bool Enter(uint32_t seen);

  // Workers inside the current loop (low 16 bits) and whether it may still be entered (kOpen).
  static constexpr uint32_t kOpen = 1u << 16;
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts loops; workers sleep on it
  alignas(64) std::atomic<int64_t> next_{0};    // first index no one has taken yet
  std::atomic<bool> stop_{false};
  Loop loop_;
  std::mutex caller_;
  std::vector<std::thread> workers_;
};

// The calling thread's scratch memory, 64-byte aligned, contents undefined, valid until its next
// call. Grows, never shrinks, so that a step in steady state allocates nothing.
void* Scratch(size_t bytes);

}  // namespace trireme::cpu
