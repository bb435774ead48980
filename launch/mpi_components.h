// The components of the Open MPI that this process runs with, against those that the environment
// asks for.
#pragma once

#include <map>
#include <string>

#include "launch/environment.h"

namespace trireme {

// By variable (OMPI_MCA_btl, PMIX_MCA_gds, ...) the first component it asks for that this Open MPI,
// or its PMIx, has not, and OPAL_PREFIX when it names no folder: MPI or mpirun would crash or end
// with a page of text of its own. Of frameworks that neither starts without.
std::map<std::string, std::string> AbsentMpiComponents(const Environment& environment);

}  // namespace trireme
