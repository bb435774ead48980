// Sums over peer memory as the NCCL communicator makes them: which sums, and what start-up tries
// and measures.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/peer_sum.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "parallel/nccl/cuda_peer_memory.h"
#include "parallel/nccl/sum_crossover.h"
#include "parallel/peer_memory.h"

namespace trireme {

// Of the communicator's memory in the ledger: ResourceExhausted says so.
absl::StatusOr<Buffer> AllocateForSums(Device& device, int64_t bytes);

class PeerSums {
 public:
  // `mapping` holds a CudaPeerMemory.
  PeerSums(std::shared_ptr<PeerMapping> mapping, PeerWay way)
      : mapping_(std::move(mapping)),
        memory_(static_cast<CudaPeerMemory&>(mapping_->memory())),
        way_(way) {}

  // The way of a sum, the same on all ranks; none: it is NCCL's, as all are until they have been
  // measured.
  std::optional<cuda::PeerPath> PathOf(ConstTensorView data) const;
  std::optional<cuda::PeerPath> PathOfNorm(ConstTensorView data) const;
  // Nothing once given up.
  void Sum(cudaStream_t stream, cuda::PeerPath path, TensorView data) const;
  void SumAddNorm(cudaStream_t stream, cuda::PeerPath path, TensorView data, TensorView residual,
                  const NormParams& norm, TensorView out) const;
  // What a rank sends and receives for a sum of so many bytes.
  int64_t MovedBytes(cuda::PeerPath path, int64_t bytes) const;

  // The group's other way, on `stream`.
  struct Nccl {
    cudaStream_t stream;
    std::function<void(TensorView data)> sum;
    std::function<void(const void* in, void* out, int64_t bytes)> gather;  // device memory
  };
  // Takes what Measure works in, until its end.
  absl::Status Reserve(Device& device, int64_t max_bytes);
  // Collective, outside of captures. Tries whether sums over peers give NCCL's bits, and where they
  // do on all ranks, how long sums of up to `max_bytes` take either way. With a way of its own
  // nothing is measured: all sums that fit go so. REQUIRES: all have reserved for as much.
  void Measure(const Nccl& nccl, int64_t max_bytes);
  const SumLimits& limits() const { return limits_; }

  void GiveUp() { memory_.GiveUp(); }  // any thread
  int64_t bytes() const {
    return memory_.bytes() + static_cast<int64_t>(data_.bytes() + gathered_.bytes());
  }

 private:
  class Trial;
  SumLimits MeasuredLimits(const Nccl& nccl, int64_t max_bytes);
  bool Fits(cuda::PeerPath path, ConstTensorView data) const;
  bool FitsRows(cuda::PeerPath path, DType dtype, const cuda::PeerRows& rows) const;
  std::optional<cuda::PeerPath> Choose(ConstTensorView data, const cuda::PeerRows& rows) const;

  std::shared_ptr<PeerMapping> mapping_;
  CudaPeerMemory& memory_;
  Buffer data_, gathered_;  // from Reserve to Measure
  const PeerWay way_;
  SumLimits limits_;
};

}  // namespace trireme
