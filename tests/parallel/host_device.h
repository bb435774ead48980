// The least a communicator needs of a device: host memory and a stream that runs inline. Keeps the
// tests of parallel/ independent of any backend's ops.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/device.h"

namespace trireme {

class HostStream final : public Stream {
 public:
  explicit HostStream(Device* device) : Stream(device, nullptr) {}
  void Copy(void* dst, const void* src, size_t bytes) override {
    if (bytes > 0) std::memcpy(dst, src, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }
};

class HostDevice final : public Device {
 public:
  HostDevice() : HostDevice(true) {}
  explicit HostDevice(bool host_memory) {
    spec_.name = "host";
    spec_.host_memory = host_memory;
  }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    return Buffer(std::calloc(bytes + 1, 1), bytes, [](void* data, size_t) { std::free(data); });
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return std::make_unique<HostStream>(this);
  }
};

struct Host {
  HostDevice device;
  HostStream stream{&device};
};

}  // namespace trireme
