// An NVIDIA GPU as a Device: memory from cudaMalloc, a CUDA stream for every Stream, the ops of
// cuda_ops.h.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace trireme::cuda {

// The host's GPU number options.local_index. Unavailable says what is missing: driver, GPU, a
// supported chip.
absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options);

}  // namespace trireme::cuda
