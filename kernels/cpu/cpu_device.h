// The CPU backend: host memory, oneDNN matmuls, own vectorised kernels for the rest. See device.h
// for the contract.
#pragma once

#include <memory>

#include "kernels/device.h"

namespace trireme {

// threads: how many an op may use; 0 = all cores this process may run on.
absl::StatusOr<std::unique_ptr<Device>> NewCpuDevice(int threads);

}  // namespace trireme
