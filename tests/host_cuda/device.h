// A Device that runs the CUDA backend's kernels on the CPU, in the emulator: what a test of an op
// opens beside "cpu" and "cuda". Launches are synchronous; memory is the host's. A stream captures
// as CUDA's does: launches with their arguments, and copies with their addresses and sizes, are
// kept by value and done again with each replay, so that a value which the host had in hand at the
// capture stays as it was.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "kernels/device.h"

namespace trireme {

// `hidden`: outside of copies and kernels the device's memory cannot be touched (the process gets a
// SIGSEGV), as on a GPU. One such device at a time, used from one thread.
std::unique_ptr<Device> NewHostCudaDevice(bool hidden = false);

// The same with matmuls of many rows by the library `file`, opened as cuBLASLt is; empty: by the
// double of cublas_lt_double.h, which computes on the host.
absl::StatusOr<std::unique_ptr<Device>> NewHostCudaDeviceWithCublasLt(const std::string& file = "");

// For tests: what an allocation of memory or a capture ends with, and who hears of a graph's end.
// Empty: nothing special.
struct HostCudaHooks {
  std::function<absl::Status(size_t bytes)> allocating;
  std::function<absl::Status()> captured;
  std::function<void()> graph_gone;
};
HostCudaHooks& HostCudaTestHooks();

}  // namespace trireme
