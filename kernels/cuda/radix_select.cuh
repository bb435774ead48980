// Radix select: the k-th largest of unsigned keys, a digit of eight bits at a time, by one block.
#pragma once

#include "kernels/cuda/gpu.h"

namespace trireme::cuda {

// Finds the `rank`-th largest (from 1) of key_of(i), i in [0, n), among the keys that are not 0;
// ties count each. `rank` becomes its place among its equals. All threads call it and get the same.
template <int kThreads, typename KeyOf>
__device__ auto SelectLargest(int n, KeyOf&& key_of, int& rank) {
  using Key = decltype(key_of(0));
  GPU_SHARED(count, int[256]);
  GPU_SHARED(chosen, int[2]);
  Key prefix = 0, mask = 0;
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) count[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const Key key = key_of(i);
      if (key == 0 || (key & mask) != prefix) continue;
      atomicAdd(&count[static_cast<int>(key >> shift & 255)], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255, above = 0;
      while (digit > 0 && above + count[digit] < rank) above += count[digit--];
      chosen[0] = digit;
      chosen[1] = rank - above;
    }
    __syncthreads();
    prefix |= static_cast<Key>(chosen[0]) << shift;
    mask |= static_cast<Key>(255) << shift;
    rank = chosen[1];
    __syncthreads();
  }
  return prefix;
}

}  // namespace trireme::cuda
