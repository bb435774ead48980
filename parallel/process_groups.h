// This rank's communicators: one per axis of the topology. Any other group becomes a named member
// here.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "parallel/communicator.h"
#include "parallel/control_plane.h"
#include "parallel/topology.h"

namespace trireme {

struct ProcessGroups {
  Topology topology;
  int rank = 0;                      // in the world
  std::unique_ptr<Communicator> tp;  // ranks with the same (dp, pp)
  std::unique_ptr<Communicator> pp;  // ranks with the same (dp, tp); its rank is the stage
  int tp_index() const { return topology.TpIndex(rank); }
  int pp_index() const { return topology.PpIndex(rank); }
  int dp_index() const { return topology.DpIndex(rank); }
  bool first_stage() const { return pp_index() == 0; }
  bool last_stage() const { return pp_index() == topology.pp_size - 1; }
};

// Collective. REQUIRES: topology.world_size() == control.size().
absl::StatusOr<ProcessGroups> CreateProcessGroups(ControlPlane& control, const Topology& topology,
                                                  Device& device);
// One rank, no MPI: for tests and tools.
ProcessGroups SingleRank();

}  // namespace trireme
