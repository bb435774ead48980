// Memory that a stream's matmuls work in. What a call has used stays where it is, for graphs hold
// its address: to make more room adds to it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/device.h"
#include "kernels/status.h"

namespace trireme::cuda {

class MatMulRoom {
 public:
  absl::Status Reserve(Device& device, int64_t bytes) {
    if (bytes <= this->bytes()) return absl::OkStatus();
    ASSIGN_OR_RETURN(Buffer room, device.Allocate(static_cast<size_t>(bytes)));
    rooms_.push_back(std::move(room));
    return absl::OkStatus();
  }
  // The largest.
  void* data() const { return rooms_.back().data(); }
  int64_t bytes() const { return rooms_.empty() ? 0 : static_cast<int64_t>(rooms_.back().bytes()); }
  // Of all.
  int64_t held() const {
    size_t held = 0;
    for (const Buffer& room : rooms_) held += room.bytes();
    return static_cast<int64_t>(held);
  }

 private:
  std::vector<Buffer> rooms_;
};

// The stream's for parts of sums whose k several blocks share (PartsBytes in matmul_select.h),
// which one matmul uses at a time. Each device defines it.
MatMulRoom& PartsRoomOf(Stream& stream);

}  // namespace trireme::cuda
