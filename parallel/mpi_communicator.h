// The communicator for tensors in host memory, over MPI. Made by process_groups.cc and the benches.
#pragma once

#include <memory>

#include "parallel/communicator.h"
#include "parallel/control_plane.h"

namespace trireme {

// Collective over all ranks of `control`: those with the same `color` form a group, ordered by
// their world rank. A group of one gets the self communicator. `control` must outlive the result;
// destroy it on all ranks in the same order. use_shared_memory: collectives of a group on one host
// go through a shared window instead of messages; same bits.
std::unique_ptr<Communicator> NewMpiCommunicator(const ControlPlane& control, int color,
                                                 bool use_shared_memory = true);

}  // namespace trireme
