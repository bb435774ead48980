// The arithmetic of a reduction: element-wise sum of the ranks' arrays, in fp32, in the order
// given, rounded once. Called by the communicators; any thread.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/dtype.h"

namespace trireme {

// out[i] = inputs[0][i] + inputs[1][i] + ..., left to right. Each array [n] of dtype f32, bf16 or
// f16; `out` may be one of the inputs. The bits of out[i] depend on nothing but the i-th elements
// and their order.
void SumInOrder(DType dtype, std::span<const void* const> inputs, int64_t n, void* out);

}  // namespace trireme
