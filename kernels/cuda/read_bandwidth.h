// A kernel that does nothing but read. Internal to the CUDA module.
#pragma once

#include <cstdint>

#include "kernels/cuda/gpu.h"

namespace trireme::cuda {

// Reads `bytes` (a multiple of 16) of data once; `out` [4 bytes] keeps the compiler honest.
void ReadOnce(gpu::StreamHandle stream, const void* data, int64_t bytes, int blocks, void* out);

}  // namespace trireme::cuda
