// Environments recorded with `trireme doctor --json` under real launchers, changed where a test
// needs something else. environments/: Debian 12's Open MPI 4.1.4 alone, under mpirun, sbatch and
// srun --mpi=pmix, pmi2 and none; Debian 13's Open MPI 5.0.7; MPICH's mpiexec.
#pragma once

#include <string>

#include "launch/environment.h"

namespace trireme {

// environments/<name>.json with `patch` (RFC 7386: null removes) applied.
Environment Recorded(const std::string& name, const std::string& patch = "{}");

}  // namespace trireme
