// The communicator for tensors in host memory, over MPI. Made by process_groups.cc and the benches.
#pragma once

#include <memory>

#include "parallel/communicator.h"
#include "parallel/control_plane.h"

namespace trireme {

struct MpiCommunicatorOptions {
  // Collectives of a group on one host go through a shared window instead of messages; same bits.
  bool use_shared_memory = true;
  // The tensors are host memory whatever device the stream belongs to; it must be idle where it
  // matters to them. Else a stream of a device with its own memory is our fault.
  bool any_stream = false;
  const char* name = "group";  // to people: "tp"; 7 characters at most
};

// Collective over all ranks of `control`: those with the same `color` form a group, ordered by
// their world rank, which must be evenly spaced. A group of one gets the self communicator.
// `control` must outlive the result; destroy it on all ranks in the same order. use_shared_memory:
// collectives of a group on one host go through a shared window instead of messages; same bits.
std::unique_ptr<Communicator> NewMpiCommunicator(const ControlPlane& control, int color,
                                                 const MpiCommunicatorOptions& options = {});

// What a communicator of `size` ranks holds after Reserve and ChooseSums of max_bytes: its part of
// the window on one host, the parts to be summed between hosts.
int64_t MpiCommunicatorBytes(int size, int64_t max_bytes, bool spans_hosts);

}  // namespace trireme
