// Activations as e4m3, for matmuls that multiply codes with codes. One kernel ahead of the matmul
// makes them, once for all blocks: in the matmul every block would have to look through whole rows
// for their maxima. Used by the stream's thread.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/matmul_room.h"
#include "kernels/cuda/matmul_workspace.h"
#include "kernels/tensor.h"

namespace trireme::cuda {

struct Codes {
  const E4M3* codes = nullptr;    // [rows, k]
  const float* scales = nullptr;  // [rows]: a 256th of ActivationScale (quantize.h)
};

// Enqueues them: codes [rows, k], `permuted` each stretch of 64 in the order of matmul_launch.h,
// and scales. Rows that are not finite have a scale that is NaN.
void QuantizeActivations(gpu::StreamHandle handle, ConstTensorView x, bool permuted, E4M3* codes,
                         float* scales);

// A stream's memory for them, which one matmul uses at a time. Each device defines CodesRoomOf.
class CodesRoom {
 public:
  // For `rows` rows of k; gives the bytes held.
  absl::StatusOr<int64_t> Reserve(Device& device, int64_t rows, int64_t k);
  int64_t RowsWithRoom(int64_t k) const {
    return room_.bytes() == 0 ? 0 : (room_.bytes() - kRoomGap) / CodesRowBytes(k);
  }
  // REQUIRES: there is room for x.
  Codes Quantize(gpu::StreamHandle handle, ConstTensorView x, bool permuted) const;

 private:
  MatMulRoom room_;
};
CodesRoom& CodesRoomOf(Stream& stream);

}  // namespace trireme::cuda
