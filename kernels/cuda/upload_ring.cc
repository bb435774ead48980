#include "kernels/cuda/upload_ring.h"

#include <algorithm>
#include <cstring>

namespace trireme::cuda {

UploadRing::~UploadRing() {
  for (const Slot& slot : slots_) {
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    if (slot.memory != nullptr) cudaFreeHost(slot.memory);
  }
}

bool UploadRing::Takes(const void* src, size_t bytes, size_t rows) {
  if (bytes > kSlotBytes || bytes * rows > kMostBytes) return false;
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, src) == cudaSuccess)
    return attributes.type == cudaMemoryTypeUnregistered;
  cudaGetLastError();  // clears it; the copy itself will say what is wrong
  return false;
}

cudaError_t UploadRing::Take(Slot** slot) {
  *slot = &slots_[next_++ % kSlots];
  Slot& s = **slot;
  if (s.copied != nullptr) return cudaEventSynchronize(s.copied);
  void* memory = s.memory;
  if (memory == nullptr) {
    const cudaError_t error = cudaHostAlloc(&memory, kSlotBytes, cudaHostAllocDefault);
    if (error != cudaSuccess) return error;
    s.memory = static_cast<char*>(memory);
  }
  return cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming);
}

cudaError_t UploadRing::Copy(void* dst, size_t dst_stride, const void* src, size_t src_stride,
                             size_t bytes, size_t rows, cudaStream_t stream) {
  const size_t rows_of_slot = kSlotBytes / bytes;
  for (size_t first = 0; first < rows; first += rows_of_slot) {
    const size_t count = std::min(rows_of_slot, rows - first);
    Slot* slot = nullptr;
    cudaError_t error = Take(&slot);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // clears it
      return cudaMemcpy2DAsync(static_cast<char*>(dst) + first * dst_stride, dst_stride,
                               static_cast<const char*>(src) + first * src_stride, src_stride,
                               bytes, rows - first, cudaMemcpyDefault, stream);
    }
    if (error != cudaSuccess) return error;
    for (size_t r = 0; r < count; ++r) {
      std::memcpy(slot->memory + r * bytes,
                  static_cast<const char*>(src) + (first + r) * src_stride, bytes);
    }
    char* const to = static_cast<char*>(dst) + first * dst_stride;
    error = count == 1 ? cudaMemcpyAsync(to, slot->memory, bytes, cudaMemcpyDefault, stream)
                       : cudaMemcpy2DAsync(to, dst_stride, slot->memory, bytes, bytes, count,
                                           cudaMemcpyDefault, stream);
    if (error == cudaSuccess) error = cudaEventRecord(slot->copied, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace trireme::cuda
