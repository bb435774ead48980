// The communicator for tensors in host memory, over MPI. Made by process_groups.cc and the benches.
#pragma once

#include <memory>

#include "parallel/communicator.h"
#include "parallel/control_plane.h"

namespace trireme {

// Collective over all ranks of `control`: those with the same `color` form a group, ordered by their world rank. A group
// of one gets the self communicator. `control` must outlive the result.
std::unique_ptr<Communicator> NewMpiCommunicator(const ControlPlane& control, int color);

}  // namespace trireme
