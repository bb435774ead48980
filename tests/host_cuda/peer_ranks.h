// The ranks of a group that sums over peer memory, as threads of one process.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/cuda/peer_sum.h"
#include "tests/testing.h"

namespace trireme {

class PeerRanks {
 public:
  explicit PeerRanks(int size) : size_(size), launched_(size, 0) {
    for (int r = 0; r < size; ++r)
      memory_.push_back(cpu_.Zeros(DType::kU8, {cuda::PeerMemoryBytes(kHalfBytes)}));
  }
  cuda::PeerGroup Of(int rank) {
    cuda::PeerGroup group{.rank = rank, .size = size_, .half_bytes = kHalfBytes};
    for (int r = 0; r < size_; ++r) group.memory[r] = memory_[r].view().as<char>();
    group.launched = &launched_[rank];
    group.given_up = &given_up_;
    return group;
  }
  // Calls work(rank) of all ranks at once.
  void Run(const std::function<void(int)>& work) const {
    std::vector<std::jthread> threads;
    for (int r = 0; r < size_; ++r) threads.emplace_back([&work, r] { work(r); });
  }
  void GiveUp() { std::atomic_ref(given_up_).store(1); }
  int size() const { return size_; }
  const TestDevice& cpu() const { return cpu_; }

 private:
  static constexpr int64_t kHalfBytes = 1 << 18;
  const int size_;
  const TestDevice cpu_;
  std::vector<Tensor> memory_;
  std::vector<uint64_t> launched_;
  uint32_t given_up_ = 0;
};

}  // namespace trireme
