// PeerMemory on a GPU, by CUDA's interprocess handles: what sums over peers exchange through
// (kernels/cuda/peer_sum.h).
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/peer_sum.h"
#include "kernels/device.h"
#include "parallel/peer_memory.h"

namespace trireme {

class CudaPeerMemory final : public PeerMemory {
 public:
  // `device` is one of the CUDA module. Not of the memory that Device::allocated_bytes counts.
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Create(Device& device);
  ~CudaPeerMemory() override;

  std::string handle() const override;
  // Unavailable: a GPU cannot reach another's memory, or the process may not.
  absl::Status Open(int rank, std::span<const std::string> handles) override;
  void Close() override;
  int64_t bytes() const override { return bytes_; }

  const cuda::PeerGroup& group() const { return group_; }  // REQUIRES: open
  // Any thread: kernels that wait for other ranks stop waiting, now and ever after.
  void GiveUp();
  bool given_up() const;

 private:
  explicit CudaPeerMemory(Device& device);
  absl::Status Allocate();

  const std::string name_, bus_id_;  // of the GPU
  int device_index_ = 0;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  cudaIpcMemHandle_t handle_{};
  uint32_t* given_up_ = nullptr;  // host memory that the GPU reads
  cuda::PeerGroup group_;
};

}  // namespace trireme
