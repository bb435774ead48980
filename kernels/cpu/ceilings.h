// The CPU's part of kernels/ceilings.h.
#pragma once

#include "kernels/ceilings.h"

namespace trireme {

// 256 MiB of memory, all threads of the stream's device.
absl::StatusOr<Ceilings> MeasureCpuCeilings(Stream& stream);

}  // namespace trireme
