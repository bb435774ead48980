// A kernel that does nothing but read, of which can be asked what goes for all kernels. Internal to
// the CUDA module.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cuda/gpu.h"

namespace trireme::cuda {

// Reads `bytes` (a multiple of 16) of data once; `out` [4 bytes] keeps the compiler honest.
void ReadOnce(gpu::StreamHandle stream, const void* data, int64_t bytes, int blocks, void* out);

// Why the calling thread's current GPU has no machine code in this build; empty: it has.
std::string WhyNoCode();

}  // namespace trireme::cuda
