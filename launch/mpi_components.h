// The components of the Open MPI that this process runs with, against those that the environment
// asks for.
#pragma once

#include <map>
#include <string>

#include "launch/environment.h"

namespace trireme {

// By variable (OMPI_MCA_btl, ...) the first component it asks for that this Open MPI has not: MPI
// or mpirun would end with a page of text of its own. Of frameworks that neither starts without.
std::map<std::string, std::string> AbsentMpiComponents(const Environment& environment);

}  // namespace trireme
