// What a model's matmuls hold of the device beside their weights: pure functions, by which
// ReserveMatMul makes its rooms and a plan counts them without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "kernels/cuda/matmul_select.h"
#include "kernels/dtype.h"

namespace trireme::cuda {

// More rows than this go through in pieces, which bounds the workspace: 4,096 x 4,096 outputs are
// 512 tiles of 128 x 256, four waves of an H100's 132 SMs, and more would not be faster.
inline constexpr int64_t kLibraryRows = 4096;
// cuBLASLt's own, beside its room.
inline constexpr int64_t kLibraryWorkspaceBytes = int64_t{32} << 20;
// Between two arrays of a room, which both begin on as much.
inline constexpr int64_t kRoomGap = 256;

// Whether W is stored for the tensor cores: rows of whole 64 bytes.
constexpr bool StoredPermuted(DType dtype, int64_t k) {
  if (dtype == DType::kE4M3) return k % 64 == 0;
  return SizeOf(dtype) == 2 && k % 32 == 0;
}

struct MatMulShape {
  int64_t n = 0, k = 0;
  bool permuted = false;   // StoredPermuted
  bool gated = false;      // n are gate and up
  bool codes = false;      // activations are quantised
  bool by_cublas = false;  // cuBLASLt has a way with such a weight
};

// Of a row: k codes and a scale.
constexpr int64_t CodesRowBytes(int64_t k) { return k + static_cast<int64_t>(sizeof(float)); }
// Of a row: x's columns, permuted, where they are no codes, and gate and up.
constexpr int64_t LibraryRowBytes(const MatMulShape& w) {
  constexpr int64_t kElement = 2;
  return ((w.codes ? 0 : w.k) + (w.gated ? w.n : 0)) * kElement;
}

struct MatMulRooms {
  int64_t rows = 0;               // that they are for at once
  int64_t codes_k = 0;            // of the longest row of codes; 0 = none
  int64_t cublas_row_bytes = -1;  // -1 = cuBLASLt computes nothing
  int64_t parts = 0;              // bytes (PartsBytes)
  constexpr int64_t bytes() const {
    return (codes_k > 0 ? rows * CodesRowBytes(codes_k) + kRoomGap : 0) +
           (cublas_row_bytes >= 0 ? kLibraryWorkspaceBytes + rows * cublas_row_bytes + kRoomGap
                                  : 0) +
           parts;
  }
};

// For matmuls of up to `rows` rows.
constexpr MatMulRooms RoomsOf(int64_t rows, std::span<const MatMulShape> weights) {
  MatMulRooms rooms{.rows = std::min(rows, kLibraryRows)};
  for (const MatMulShape& w : weights) {
    if (w.codes) rooms.codes_k = std::max(rooms.codes_k, w.k);
    if (rows <= kFewRowsLimit || !w.permuted) continue;
    if (w.by_cublas) {
      rooms.cublas_row_bytes = std::max(rooms.cublas_row_bytes, LibraryRowBytes(w));
    } else {
      rooms.parts = std::max(rooms.parts, PartsBytes(w.n, w.k));
    }
  }
  return rooms;
}

}  // namespace trireme::cuda
