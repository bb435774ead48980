// The ranks of a group that sums over peer memory, all on one GPU, each on a stream of its own:
// what there is to try and to measure without a second GPU. A GPU's queues are eight, and streams
// may share one, so at most four ranks. One thread.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/peer_sum.h"

namespace trireme {

inline void Must(cudaError_t error) { CHECK(error == cudaSuccess) << cudaGetErrorString(error); }

class OneGpuRanks {
 public:
  OneGpuRanks(int size, int64_t half_bytes) : half_bytes_(half_bytes), streams_(size) {
    Must(cudaHostAlloc(&given_up_, sizeof(*given_up_), cudaHostAllocMapped));
    *given_up_ = 0;
    for (int r = 0; r < size; ++r) {
      Must(cudaStreamCreateWithFlags(&streams_[r], cudaStreamNonBlocking));
      void* memory = nullptr;
      const auto bytes = static_cast<size_t>(cuda::PeerMemoryBytes(half_bytes_)) + sizeof(uint64_t);
      Must(cudaMalloc(&memory, bytes));
      Must(cudaMemset(memory, 0, bytes));
      memory_.push_back(static_cast<char*>(memory));
    }
    Must(cudaDeviceSynchronize());
  }
  ~OneGpuRanks() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (char* memory : memory_) cudaFree(memory);
    cudaFreeHost(given_up_);
  }
  OneGpuRanks(const OneGpuRanks&) = delete;
  OneGpuRanks& operator=(const OneGpuRanks&) = delete;

  int size() const { return static_cast<int>(streams_.size()); }
  cudaStream_t stream(int rank) const { return streams_[rank]; }
  cuda::PeerGroup Of(int rank) const {
    cuda::PeerGroup group{.rank = rank, .size = size(), .half_bytes = half_bytes_};
    for (int r = 0; r < size(); ++r) group.memory[r] = memory_[r];
    group.launched =
        reinterpret_cast<uint64_t*>(memory_[rank] + cuda::PeerMemoryBytes(half_bytes_));
    void* word = nullptr;
    Must(cudaHostGetDevicePointer(&word, given_up_, 0));
    group.given_up = static_cast<const uint32_t*>(word);
    return group;
  }
  // False: the ranks were given up.
  bool Wait() const {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    bool in_time = true;
    for (cudaStream_t stream : streams_) {
      while (cudaStreamQuery(stream) == cudaErrorNotReady) {
        if (std::chrono::steady_clock::now() < end) continue;
        in_time = false;
        *static_cast<volatile uint32_t*>(given_up_) = 1;
      }
    }
    Must(cudaDeviceSynchronize());
    return in_time;
  }

 private:
  // Longer than any sum takes; what has not ended by then waits for what will never come.
  static constexpr auto kPatience = std::chrono::seconds(20);

  const int64_t half_bytes_;
  std::vector<cudaStream_t> streams_;
  std::vector<char*> memory_;
  uint32_t* given_up_ = nullptr;
};

}  // namespace trireme
