// What this machine can do at best, measured: the ceilings `trireme bench` and tests/bench divide
// by.
#pragma once

#include "kernels/device.h"

namespace trireme {

struct CpuCeilings {
  double read_bytes_per_s = 0;  // streaming read of memory that no cache holds
  double matmul_flops_f32 = 0;  // multiply-adds on registers alone, FLOP/s: no matmul can be faster
  double matmul_flops_bf16 = 0;  // the same with the instructions a bf16 matmul uses here
};

// All threads of the stream's device (a CPU's), about a second in total, 256 MiB of memory. The
// best of several tries: a ceiling is what the machine can do when nobody disturbs it.
absl::StatusOr<CpuCeilings> MeasureCpuCeilings(Stream& stream);

}  // namespace trireme
