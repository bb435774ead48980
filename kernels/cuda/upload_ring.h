// Page-locked memory on the way of small uploads. A copy from ordinary memory may wait for what its
// stream has to do before it ("API synchronization behavior" of the CUDA runtime's manual), and a
// step has several at its front; from here it only queues.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>

namespace trireme::cuda {

// Of one stream. Memory and events are made at their first use and kept; used by one thread.
class UploadRing {
 public:
  UploadRing() = default;
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;
  ~UploadRing();

  // Whether an upload of `rows` rows of so many bytes from `src` goes this way: small, from
  // ordinary memory of the host.
  static bool Takes(const void* src, size_t bytes, size_t rows);
  // Enqueues it; `src` may be written again when this returns. Waits only where so many uploads
  // are under way that their memory must be used again, or where the host has no page-locked memory
  // to give. REQUIRES: Takes.
  cudaError_t Copy(void* dst, size_t dst_stride, const void* src, size_t src_stride, size_t bytes,
                   size_t rows, cudaStream_t stream);

  static constexpr size_t kSlotBytes = 256 << 10, kSlots = 16, kMostBytes = 1 << 20;

 private:
  struct Slot {
    char* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };
  // The next one, whose last copy is done.
  cudaError_t Take(Slot** slot);

  std::array<Slot, kSlots> slots_;
  size_t next_ = 0;
};

}  // namespace trireme::cuda
