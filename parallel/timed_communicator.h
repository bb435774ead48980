// A communicator that counts the time spent in it: on the host, from call to return.
#pragma once

#include <memory>

#include "parallel/communicator.h"

namespace trireme {

// Adds the seconds of every call to `seconds`, which must outlive it.
std::unique_ptr<Communicator> NewTimedCommunicator(std::unique_ptr<Communicator> inner,
                                                   double* seconds);

}  // namespace trireme
