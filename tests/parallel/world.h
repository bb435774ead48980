// The MPI session of a test binary registered with trireme_mpi_test; mpi_main.cc starts it before
// the first test. Tests run on all ranks in the same order. An ASSERT that fails on some ranks only
// leaves the others waiting in their next collective: its message is printed at once and mpirun's
// timeout ends the test.
#pragma once

#include "parallel/control_plane.h"

namespace trireme {
ControlPlane& World();
}  // namespace trireme
