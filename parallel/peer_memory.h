// Device memory that the ranks of a group on one host write into each other's
// (kernels/cuda/peer_sum.h). Handles travel over the control plane; it is had by all ranks of the
// world or by none.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/control_plane.h"

namespace trireme {

// Of one rank. Of a device whose memory other processes can open: the CUDA module's
// (parallel/nccl/cuda_peer_memory.h).
class PeerMemory {
 public:
  virtual ~PeerMemory() = default;  // frees it: no other rank may have it open any more
  virtual std::string handle() const = 0;
  // Opens the other ranks' memory. `handles` are those of the group, by rank; this is `rank`. Once.
  virtual absl::Status Open(int rank, std::span<const std::string> handles) = 0;
  // Undoes Open, also half of one. Work that uses the memory has ended.
  virtual void Close() = 0;
  virtual int64_t bytes() const = 0;  // of this device
};

inline constexpr int kMaxPeerRanks = 8;

// Which way sums over peer memory go where they fit in it (kernels/cuda/peer_sum.h): the one that
// was fastest for the size at start-up, where any was faster than NCCL; or always the same one, for
// benches.
enum class PeerWay : uint8_t { kMeasured, kOneShot, kTwoShot };

// A group's memory, open on all its ranks.
class PeerMapping {
 public:
  using Make = std::function<absl::StatusOr<std::unique_ptr<PeerMemory>>()>;
  // Collective over the world. `members` are the world ranks of this rank's group, in order; `make`
  // is called once they are known to share a host. An error, the same on all ranks, says why it
  // cannot be: a group of one or of more than kMaxPeerRanks, of several hosts, or what a device
  // says. `control` must outlive the mapping.
  static absl::StatusOr<std::unique_ptr<PeerMapping>> Create(ControlPlane& control,
                                                             const std::vector<int>& members,
                                                             const Make& make);
  // Collective over the world: nobody frees what another has open.
  ~PeerMapping();
  PeerMapping(const PeerMapping&) = delete;
  PeerMapping& operator=(const PeerMapping&) = delete;

  PeerMemory& memory() const { return *memory_; }

 private:
  PeerMapping(ControlPlane& control, std::unique_ptr<PeerMemory> memory)
      : control_(control), memory_(std::move(memory)) {}

  ControlPlane& control_;
  std::unique_ptr<PeerMemory> memory_;
};

}  // namespace trireme
