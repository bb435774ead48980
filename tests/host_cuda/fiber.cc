#include "tests/host_cuda/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error "host_cuda switches stacks with a few lines of x86-64 assembly; add this architecture's"
#endif

// Present only in sanitizer builds.
extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* addr);
__attribute__((weak)) void __tsan_release(void* addr);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* addr, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* addr, size_t size);

// Saves the registers a call must preserve and the stack pointer; loads the other's.
void host_cuda_switch(void** save_sp, void* load_sp);
}

asm(R"(
.text
.globl host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, .-host_cuda_switch
)");

namespace host_cuda {
namespace {
constexpr size_t kPage = 4096;   // below the stack, so that an overflow faults
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync: a switch orders nothing
}  // namespace

void Acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
void Release(void* address) {
  if (__tsan_release) __tsan_release(address);
}
void Poison(const void* address, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, bytes);
}
void Unpoison(const void* address, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, bytes);
}

char* MapMemory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// What is mapped here next is not poisoned.
void UnmapMemory(char* memory, size_t bytes) {
  Unpoison(memory, bytes);
  munmap(memory, bytes);
}

Fiber::~Fiber() {
  if (stack_ != nullptr) UnmapMemory(stack_, stack_bytes_);
  if (owns_tsan_) __tsan_destroy_fiber(tsan_);
}

void Fiber::Allocate(size_t stack_bytes) {
  stack_bytes_ = stack_bytes;
  stack_ = MapMemory(stack_bytes);
  mprotect(stack_, kPage, PROT_NONE);
  bottom_ = stack_ + kPage;
  size_ = stack_bytes - kPage;
  if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0), owns_tsan_ = true;
}

void Fiber::Start(void (*entry)()) {
  fake_stack_ = nullptr;
  Unpoison(bottom_, size_);
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;  // where entry would return to, and the alignment a called function expects
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  sp_ = top;
}

void Fiber::Adopt() {
  if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
}

void Fiber::Switch(Fiber& from, Fiber& to, bool last) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_, kNoSync);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.bottom_, to.size_);
  }
  host_cuda_switch(&from.sp_, to.sp_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
  }
}

void Fiber::Arrived(Fiber& from) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
  }
}

}  // namespace host_cuda
