// What this machine can do at best, measured: the ceilings `trireme bench` and tests/bench divide
// by.
#pragma once

#include "kernels/device.h"
#include "kernels/dtype.h"

namespace trireme {

struct Ceilings {
  double read_bytes_per_s = 0;  // streaming read of memory that no cache holds
  // CPU: multiply-adds on registers alone, FLOP/s: no matmul can be faster. GPU: cuBLASLt's best
  // rate on a large square matmul.
  double matmul_flops_f32 = 0;
  // The same in the type and instructions a bf16 or f16 matmul uses here.
  double matmul_flops_bf16 = 0;
  double matmul_flops_f16 = 0;

  // What a matmul of `dtype` operands can do at best. REQUIRES: a float type.
  double MatMulFlops(DType dtype) const {
    if (dtype == DType::kBF16) return matmul_flops_bf16;
    return dtype == DType::kF16 ? matmul_flops_f16 : matmul_flops_f32;
  }
  // What devices that work at the same time can do together.
  void Add(const Ceilings& other) {
    read_bytes_per_s += other.read_bytes_per_s;
    matmul_flops_f32 += other.matmul_flops_f32;
    matmul_flops_bf16 += other.matmul_flops_bf16;
    matmul_flops_f16 += other.matmul_flops_f16;
  }
};

// Of the stream's device, with all of its threads; about a second in total. The best of several
// tries: a ceiling is what the machine can do when nobody disturbs it. Unavailable where a GPU has
// no cuBLASLt.
absl::StatusOr<Ceilings> MeasureCeilings(Stream& stream);

}  // namespace trireme
