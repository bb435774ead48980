// The CPU, but for one error of its stream when a test asks for it: what a GPU that fails in the
// middle of a step looks like to the layers above.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "kernels/device.h"
#include "kernels/status.h"

namespace trireme {

class FailingDevice final : public Device {
 public:
  static constexpr char kError[] = "a device error that a test asked for";

  // While `*fail`, the next Synchronize of a stream fails, and makes it false; with `stays` it
  // stays so, as a GPU that is lost does. It outlives the device.
  FailingDevice(std::unique_ptr<Device> device, std::atomic<bool>* fail, bool stays = false)
      : device_(std::move(device)), fail_(fail), stays_(stays) {
    spec_ = device_->spec();
  }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return device_->Allocate(bytes); }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    absl::StatusOr<std::unique_ptr<Stream>> stream = device_->NewStream();
    if (!stream.ok()) return stream.status();
    return std::make_unique<FailingStream>(*std::move(stream), fail_, stays_);
  }

 private:
  class FailingStream final : public Stream {
   public:
    FailingStream(std::unique_ptr<Stream> stream, std::atomic<bool>* fail, bool stays)
        : Stream(&stream->device(), &stream->ops()),
          stream_(std::move(stream)),
          fail_(fail),
          stays_(stays) {}
    void Copy(void* dst, const void* src, size_t bytes) override { stream_->Copy(dst, src, bytes); }
    absl::Status Synchronize() override {
      RETURN_IF_ERROR(Fault());
      if (fail_->exchange(false)) return absl::InternalError(kError);
      return stream_->Synchronize();
    }
    absl::Status Fault() const override {
      return stays_ && *fail_ ? absl::InternalError(kError) : absl::OkStatus();
    }

   private:
    std::unique_ptr<Stream> stream_;
    std::atomic<bool>* fail_;
    const bool stays_;
  };

  std::unique_ptr<Device> device_;
  std::atomic<bool>* fail_;
  const bool stays_;
};

}  // namespace trireme
