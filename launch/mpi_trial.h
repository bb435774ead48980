// Whether MPI starts with what the environment sets for Open MPI, PMIx and PRRTE. Which values each
// of their hundreds of variables may have only they know, and they end with a page of text of their
// own, by a crash or never: so they are asked, by a process that does nothing else.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "launch/environment.h"

namespace trireme {

// As only argument: this process is such a trial (TrialMain).
inline constexpr char kMpiTrial[] = "mpi-trial";
// Starts and ends MPI. The exit status of the process.
int TrialMain();

// Fills environment->refused_mpi_variables by trials of this program, alone or by the mpirun of
// PATH, unless it is known already that MPI or mpirun does not start (launch/doctor_checks.h).
// Before threads start.
void TryMpiVariables(Environment* environment, bool mpirun);

// The OMPI_MCA_*, PMIX_MCA_* and PRTE_MCA_* variables with which `command` does not come to an end
// of status 0 within `limit`, although it does without them: those that are to blame alone or, when
// none is, some that are together. Empty when the command succeeds, as it mostly does at once, and
// when the variables are not to blame, or the machine is too slow to tell. Those that this program
// itself would set are left out (launch/single_node.h), and without others nothing is started.
std::vector<std::string> RefusedMpiVariables(
    const Environment& environment, const std::vector<std::string>& command,
    std::chrono::milliseconds limit = std::chrono::seconds(10));

}  // namespace trireme
