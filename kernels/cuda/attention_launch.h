// The attention kernels' launchers. Internal to kernels/cuda/attention*.cu.
#pragma once

#include <type_traits>

#include "kernels/cuda/attention_tile.cuh"

namespace trireme::cuda {

// [memory, memory_end): at least workspace.bytes() of device memory whose counters are zero, as the
// launch leaves them.
template <typename T>
void LaunchAttentionDecode(gpu::StreamHandle handle, const AttentionArguments<T>& arguments,
                           const DecodeWorkspace& workspace, char* memory, char* memory_end,
                           int multiprocessors);
// q_rows: rows of q.
template <typename T>
void LaunchAttentionPrefill(gpu::StreamHandle handle, const AttentionArguments<T>& arguments,
                            int64_t q_rows);

// Calls f(std::integral_constant<int, D>). REQUIRES: HasTiledAttention.
template <typename F>
void DispatchHeadDim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64:
      return f(std::integral_constant<int, 64>());
    case 80:
      return f(std::integral_constant<int, 80>());
    case 96:
      return f(std::integral_constant<int, 96>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      CHECK_EQ(head_dim, 256);
      return f(std::integral_constant<int, 256>());
  }
}

}  // namespace trireme::cuda
