// A Device that runs the CUDA backend's kernels on the CPU, in the emulator: what a test of an op
// opens beside "cpu" and "cuda". Launches are synchronous; memory is the host's.
#pragma once

#include <memory>

#include "kernels/device.h"

namespace trireme {

std::unique_ptr<Device> NewHostCudaDevice();

}  // namespace trireme
