// Where on its host a rank that drives a GPU should run: on the NUMA node the GPU is attached to,
// so that copies do not cross the sockets' link. Ranks without a GPU stay where the launcher put
// them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "launch/environment.h"

namespace trireme {

struct Placement {
  std::string gpu;  // PCI address
  int numa_node = -1;
  std::vector<int> cores;  // of that node
  bool operator==(const Placement&) const = default;
};

// "0-3,8,10-11", as /sys writes sets of cores; empty for anything else.
std::vector<int> ParseCoreList(const std::string& text);

// Of the rank with this number among those of its host: it drives the visible GPU of that number,
// or the only one. Nothing when the machine does not say which node that is on. `root` as in
// CollectOptions.
std::optional<Placement> PlacementOf(const Environment& environment, int local_rank,
                                     const std::string& root);

// Cores of the placement that this thread may use now; empty when the launcher bound it elsewhere.
std::vector<int> AllowedCores(const Placement& placement);

// Restricts this thread, and those it will start, to those cores, and lets memory come from the
// node as long as it has any. Does nothing, and returns false, when the launcher bound it
// elsewhere.
bool BindTo(const Placement& placement);

}  // namespace trireme
