// A stack to run on, and switching between stacks, in terms the sanitizers understand.
#pragma once

#include <cstddef>

namespace host_cuda {

class Fiber {
 public:
  Fiber() = default;  // the stack of the OS thread itself
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void Allocate(size_t stack_bytes);
  // The next SwitchTo(this) calls `entry`, which must never return.
  void Start(void (*entry)());
  // Leaves `from`, which is running; comes back when someone switches to it. `last` = it never
  // will.
  static void Switch(Fiber& from, Fiber& to, bool last = false);
  // The first thing a started fiber does.
  void Arrived(Fiber& from);
  // Takes the OS thread's own identity.
  void Adopt();

 private:
  void* sp_ = nullptr;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  const void* bottom_ = nullptr;  // as AddressSanitizer wants it
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
  bool owns_tsan_ = false;
};

// For ThreadSanitizer: everything before a Release happens before everything after an Acquire of
// the same address.
void Acquire(void* address);
void Release(void* address);
// For AddressSanitizer.
void Poison(const void* address, size_t bytes);
void Unpoison(const void* address, size_t bytes);

char* MapMemory(size_t bytes);
void UnmapMemory(char* memory, size_t bytes);

}  // namespace host_cuda
