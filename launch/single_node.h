// Open MPI's settings for ranks that are all on this one machine, as launch/single_node.env has
// them, for who types --ranks instead of mpirun.
#pragma once

#include <string>

namespace trireme {

// Sets those that are for this machine and not set already. Before threads start.
void SetSingleNodeEnvironment();
// Whether this is one of them, with one of the values that they may have.
bool IsSingleNodeSetting(const std::string& name, const std::string& value);

}  // namespace trireme
