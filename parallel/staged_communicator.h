// The communicator for device memory that goes through host memory: copy to the host, a host
// communicator, copy back. Slow and simple: what runs where NCCL is missing or may not be used (two
// ranks on one GPU), and the reference that other communicators for device memory are compared
// with.
#pragma once

#include <memory>

#include "parallel/communicator.h"

namespace trireme {

// `host` moves host memory, inline; its group is the result's.
std::unique_ptr<Communicator> NewStagedCommunicator(std::unique_ptr<Communicator> host);

}  // namespace trireme
