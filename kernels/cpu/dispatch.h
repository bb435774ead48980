// Runtime element type to template parameter.
#pragma once

#include "kernels/dtype.h"

namespace trireme::cpu {

// Calls f(float{}), f(BF16{}) or f(F16{}). REQUIRES: IsFloat(dtype), which ops.cc has checked.
template <typename F>
[[gnu::always_inline]] inline void DispatchFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBF16:
      return f(BF16{});
    case DType::kF16:
      return f(F16{});
    default:
      return f(float{});
  }
}

}  // namespace trireme::cpu
