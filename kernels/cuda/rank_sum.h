// The sum over ranks as the communicators define it. Internal to the CUDA module.
#pragma once

#include <cstdint>

#include "kernels/cuda/gpu.h"
#include "kernels/dtype.h"

namespace trireme::cuda {

// out[i] = the sum of parts[rank * stride + i] in fp32 and rank order, i in [0, count). out may be
// one of the parts. f32, bf16, f16.
void RankSum(gpu::StreamHandle stream, DType dtype, const void* parts, int64_t stride, int ranks,
             int64_t count, void* out);

}  // namespace trireme::cuda
