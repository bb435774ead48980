// Runs the blocks of a launch, one after the other, on the OS thread that owns the engine. Every
// CUDA thread of a block is a fiber that runs until it meets a barrier or a warp collective; which
// runnable fiber goes next is drawn from a seeded generator. Internal to tests/host_cuda.
//
// Never compiled with -fsanitize=thread (kernels and tests may be): its data is shared by all
// fibers of an OS thread without locks, by design.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/host_cuda/fiber.h"
#include "tests/host_cuda/host_cuda.h"

namespace host_cuda {

enum class State : uint8_t { kReady, kBarrier, kWarp, kDone };

// What a collective does once all lanes of its mask have arrived: slots[lane] is what lane passed.
using CollectiveFn = void (*)(void** slots, uint32_t lanes);

// A cp.async that was issued and not waited for yet.
struct PendingCopy {
  void* dst;
  const void* src;
  size_t bytes, valid;
};

struct CudaThread {
  Fiber fiber;
  uint3 tid{};
  int index = 0, warp = 0, lane = 0;
  State state = State::kReady;
  bool waited = false;  // for the launch before this one
  int barrier_id = 0, barrier_count = 0;
  CollectiveFn op = nullptr;
  uint32_t mask = 0;
  void* slot = nullptr;
  Loc loc;
  std::vector<PendingCopy> copies;  // oldest first
  std::vector<size_t> groups;       // ends of committed groups in copies
};

class BlockEngine {
 public:
  // The calling OS thread's.
  static BlockEngine& Get();
  ~BlockEngine();

  void Prepare(const Config& config, const std::function<void()>* body, const Options& options);
  // Throws KernelError.
  void RunBlock(uint3 block, uint64_t seed);

  // The rest is called by the running fiber.
  CudaThread& current() { return *current_; }
  void Barrier(int id, int count, Loc loc);
  void Spin();
  void Collective(CollectiveFn op, uint32_t mask, void* slot, Loc loc);
  void WarpSync(uint32_t mask, Loc loc);
  // `what` is a literal: the fiber is dropped and would never free a string.
  [[noreturn]] void FailHere(const char* what, Loc loc);
  void* DynamicShared() { return dynamic_; }
  void* StaticShared(const void* tag, size_t bytes);
  bool InShared(const void* p, size_t bytes) const;

 private:
  static void Entry();
  void* Take(size_t bytes);
  void ResetShared();
  void Resume(CudaThread& thread);
  void Yield();
  uint32_t Random(uint32_t n);
  void MakeReady(int index);
  void OrderReady();
  int Pick();
  bool CompleteCollective(CudaThread& thread);
  bool ReleaseWarps();
  bool ReleaseBarrier(int id);
  bool Unblock();
  [[noreturn]] void Deadlock();

  const std::function<void()>* body_ = nullptr;
  Options options_;
  std::deque<CudaThread> threads_;  // fibers never move
  std::vector<int> ready_, spinning_;
  std::vector<std::pair<const void*, void*>> statics_;
  CudaThread* current_ = nullptr;
  Fiber scheduler_;
  char* arena_ = nullptr;  // the block's shared memory
  void* dynamic_ = nullptr;
  size_t stack_bytes_ = 0, dynamic_bytes_ = 0, used_ = 0, taken_ = 0;
  int count_ = 0, live_ = 0;
  bool dependent_ = false;
  uint64_t rng_ = 1;
  std::string error_;
  // For ThreadSanitizer, which only needs their addresses: two per barrier, even and odd phases.
  char start_ = 0, end_ = 0;
  std::array<char, 32> barrier_sync_{};
  std::array<uint8_t, 16> barrier_phase_{};
  std::array<char, 2048> warp_sync_{};
  std::array<uint8_t, 1024> warp_phase_{};
};

}  // namespace host_cuda
