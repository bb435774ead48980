// NCCL as the program sees it: functions of libtrireme_cuda.so, which opens NCCL itself. The module
// side is in parallel/nccl/.
#pragma once

#include <array>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/communicator.h"
#include "parallel/peer_memory.h"

namespace trireme {

// What a rank offers for the meetings of a group.
struct NcclIds {
  std::array<char, 128> group;  // of the whole group, when this rank is its first
  std::array<char, 128> next;   // of this rank and the next
};

struct NcclGroup {
  int rank = 0, size = 1;
  const NcclIds* ids = nullptr;  // [size], one of each rank
  bool collectives = true;       // AllReduceSum and AllGather
  bool pipeline = false;         // Send and Recv between neighbours
  // Several ranks on one GPU: kernels of two ranks wait for each other there, so every call ends
  // before the next begins.
  bool shared_gpu = false;
  // Small sums go through this memory where that is faster (NewCudaPeerMemory), found out by
  // ChooseSums; null: all through NCCL.
  std::shared_ptr<PeerMapping> peers = nullptr;
  PeerWay peer_way = PeerWay::kMeasured;
};

// Unavailable when there is no usable NCCL. Opens a listening socket.
absl::StatusOr<NcclIds> MakeNcclIds();

// Memory of a device of the CUDA module, to be mapped by a group on one host.
absl::StatusOr<std::unique_ptr<PeerMemory>> NewCudaPeerMemory(Device& device);

// Collective over the group. `device` is one of the CUDA module and outlives the communicator.
// Without `collectives` or `pipeline` their calls are our fault.
absl::StatusOr<std::unique_ptr<Communicator>> NewNcclCommunicator(const NcclGroup& group,
                                                                  Device& device);

}  // namespace trireme
