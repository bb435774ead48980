// The norms of a row that ops.h computes.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace trireme {

enum class NormKind : uint8_t {
  kRms,    // x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)
  kLayer,  // d / sqrt(mean(d^2) + eps) * weight + bias with d = x - mean(x) (Ba et al. 2016)
};

struct NormParams {
  NormKind kind = NormKind::kRms;
  ConstTensorView weight;  // [H] act
  ConstTensorView bias{};  // [H] act or empty; of kLayer alone
  float eps = 0.0f;
};

}  // namespace trireme
