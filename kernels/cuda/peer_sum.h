// Sums over the ranks of a group whose GPUs reach each other's memory: every rank's kernel writes
// its part into the memory of the others and waits for theirs, so that a small sum takes one
// launch, alone or with the residual's sum and the norm behind it. Internal to the CUDA module.
//
// One-shot: everybody sends everything to everybody. Two-shot: rank r sums piece r of each row and
// sends it on; two meetings, and 2 / size of the bytes. Both add in fp32 and rank order and round
// once, so their bits are RankSum's, whatever comes first.
//
// Memory of a rank (PeerMemoryBytes, zero before the first launch): flags, and two halves for what
// is exchanged, used in turns. A rank that has left launch n has met all others in it, so they have
// left launch n - 1, and its half may be written again: no meeting at the end. Flags hold the
// number of the launch, counted in device memory, so a launch may be captured in a graph and
// replayed. REQUIRES: all ranks enqueue the same launches in the same order, on one stream each.
#pragma once

#include <cstdint>

#include "kernels/cuda/gpu.h"
#include "kernels/norm.h"
#include "kernels/tensor.h"

namespace trireme::cuda {

inline constexpr int kMaxPeers = 8;
// Of a launch. They all wait for others, so all must be on the chip: few enough for any.
inline constexpr int kMaxPeerBlocks = 32;

enum class PeerPath : uint8_t { kOneShot, kTwoShot };

// What a launch knows of its group; goes by value.
struct PeerGroup {
  int rank = 0, size = 1;
  int64_t half_bytes = 0;              // of the exchange, a multiple of 16
  char* memory[kMaxPeers] = {};        // each rank's, at this rank's addresses
  uint64_t* launched = nullptr;        // this rank's own, on the device, 0 at first
  const uint32_t* given_up = nullptr;  // not 0: who waits for others stops; may be null
};

inline constexpr int64_t kPeerFlagBytes =
    2 * kMaxPeers * kMaxPeerBlocks * static_cast<int64_t>(sizeof(uint64_t));
inline int64_t PeerMemoryBytes(int64_t half_bytes) { return kPeerFlagBytes + 2 * half_bytes; }

// How a sum is cut, by its shape alone: the same on all ranks. Blocks take rows in turns; a row is
// exchanged between the blocks that have the same number.
struct PeerRows {
  int64_t rows = 0;
  int64_t width = 0;  // elements of a row; the last row may be shorter
  int64_t piece = 0;  // two-shot: those that one rank sums, a multiple of 16 bytes
};
PeerRows RowsOfSum(DType dtype, int64_t elements, int ranks);
PeerRows RowsOfNorm(DType dtype, int64_t rows, int64_t width, int ranks);
// What they take of a half.
int64_t PeerBytes(PeerPath path, DType dtype, const PeerRows& rows, int ranks);

// data = the sum over ranks. f32, bf16, f16; contiguous; PeerBytes fit in a half.
void PeerSum(gpu::StreamHandle stream, const PeerGroup& group, PeerPath path, TensorView data);

// residual += the sum of data; out = Norm(residual), shapes as in AddNorm (ops.h), data contiguous.
// The bits are those of PeerSum and AddNorm. Leaves data as it was or summed.
void PeerSumAddNorm(gpu::StreamHandle stream, const PeerGroup& group, PeerPath path,
                    TensorView data, TensorView residual, const NormParams& norm, TensorView out);

}  // namespace trireme::cuda
