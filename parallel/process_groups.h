// This rank's communicators: one per axis of the topology. Any other group becomes a named member
// here.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "parallel/communicator.h"
#include "parallel/control_plane.h"
#include "parallel/failure_detector.h"
#include "parallel/peer_memory.h"
#include "parallel/topology.h"

namespace trireme {

struct ProcessGroups {
  Topology topology;
  int rank = 0;                      // in the world
  std::unique_ptr<Communicator> tp;  // ranks with the same (dp, pp)
  // The tp group for host memory, where tp moves device memory; else null.
  std::unique_ptr<Communicator> host_tp;
  std::unique_ptr<Communicator> pp;        // ranks with the same (dp, tp); its rank is the stage
  std::vector<CommunicatorWatch> watches;  // of those above whose calls are enqueued
  Communicator& tp_of_host() const { return host_tp ? *host_tp : *tp; }
  int tp_index() const { return topology.TpIndex(rank); }
  int pp_index() const { return topology.PpIndex(rank); }
  int dp_index() const { return topology.DpIndex(rank); }
  bool first_stage() const { return pp_index() == 0; }
  bool last_stage() const { return pp_index() == topology.pp_size - 1; }
};

// How tensors in device memory move between ranks.
enum class Collectives : uint8_t {
  kAuto,  // NCCL, small sums over peer memory; through host memory where ranks share a GPU
  kNccl,  // NCCL alone
  kHost,  // copied to the host and moved by MPI
};

struct ProcessGroupOptions {
  Collectives collectives = Collectives::kAuto;
  bool allow_shared_gpu = false;          // else two ranks on one GPU are an error
  PeerWay peer_way = PeerWay::kMeasured;  // with kAuto
};

// Collective; every rank gives the same options. REQUIRES: topology.world_size() == control.size().
// `device` must outlive the groups.
absl::StatusOr<ProcessGroups> CreateProcessGroups(ControlPlane& control, const Topology& topology,
                                                  Device& device,
                                                  const ProcessGroupOptions& options = {});
// One rank, no MPI: for tests and tools.
ProcessGroups SingleRank();

}  // namespace trireme
