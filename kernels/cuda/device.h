// The GPU as a Device, and its stream. Internal to the CUDA module.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/matmul_library.h"
#include "kernels/cuda/upload_ring.h"
#include "kernels/device.h"

namespace trireme::cuda {

// Unavailable names what is missing: no driver, one older than this build's runtime, no GPU, a chip
// the kernels are not compiled for. Makes the GPU the calling thread's current one.
absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options);

// CUDA finds no driver; `loaded`: there is one in the kernel.
absl::Status NoDriver(bool loaded);

// DeviceSpec.identity of the GPUs that OpenCudaDevice opens, in the order of local_index.
// Unavailable as there.
absl::StatusOr<std::vector<std::string>> UsableDevices();

// "WHAT: CUDA's words", and the remedy where there is one. ResourceExhausted: out of memory.
absl::Status StatusOf(cudaError_t error, const std::string& what);

class CudaStream final : public Stream {
 public:
  // `cublas` may be null.
  CudaStream(Device* device, int device_index, bool waits_for_copies, cudaStream_t handle,
             const CublasLt* cublas);
  ~CudaStream() override;
  void Copy(void* dst, const void* src, size_t bytes) override;
  void CopyRows(void* dst, size_t dst_stride, const void* src, size_t src_stride, size_t bytes,
                size_t rows) override;
  // Polls, so that what a watch reports ends the wait for work that will never be done.
  absl::Status Synchronize() override;
  absl::Status Fault() const override;
  absl::StatusOr<std::unique_ptr<Graph>> Capture(const std::function<void()>& work) override;

  // To enqueue on: its GPU becomes the calling thread's current one, which kernels must be launched
  // with.
  cudaStream_t handle() const;
  int device_index() const { return device_index_; }
  MatMulLibrary* matmul_library() const { return library_.get(); }
  CodesRoom& codes_room() { return codes_room_; }
  MatMulRoom& parts_room() { return parts_room_; }
  // Asked now and then while Synchronize waits; not OK = the stream's work is lost. `owner` ends
  // it.
  void Watch(const void* owner, std::function<absl::Status()> healthy);
  void EndWatch(const void* owner);

 private:
  absl::Status WatchesHealthy() const;
  bool UsesRing(const void* src, size_t bytes, size_t rows) const;
  void EndCopy(cudaError_t error);
  absl::Status Wait();

  struct WatchEntry {
    const void* owner;
    std::function<absl::Status()> healthy;
  };
  const int device_index_;
  const bool waits_for_copies_;
  cudaStream_t handle_;
  bool capturing_ = false;
  UploadRing uploads_;
  std::vector<WatchEntry> watches_;
  const std::unique_ptr<MatMulLibrary> library_;  // or null
  CodesRoom codes_room_;
  MatMulRoom parts_room_;
};

}  // namespace trireme::cuda
