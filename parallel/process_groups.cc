#include "parallel/process_groups.h"

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "parallel/mpi_communicator.h"

namespace trireme {

absl::StatusOr<ProcessGroups> CreateProcessGroups(ControlPlane& control, const Topology& topology,
                                                  Device& device) {
  CHECK_EQ(topology.world_size(), control.size());
  if (!device.spec().host_memory) {
    return absl::UnimplementedError(absl::StrCat(
        "device ", device.spec().name, ": this build moves only host memory between ranks"));
  }
  ProcessGroups groups;
  groups.topology = topology;
  groups.rank = control.rank();
  // A color is the rank of the group's first member, so it is unique among the groups of an axis.
  const int dp = groups.dp_index(), pp = groups.pp_index(), tp = groups.tp_index();
  groups.tp = NewMpiCommunicator(control, topology.RankOf(dp, pp, 0));
  groups.pp = NewMpiCommunicator(control, topology.RankOf(dp, 0, tp));
  CHECK(groups.tp->rank() == tp && groups.tp->size() == topology.tp_size);
  CHECK(groups.pp->rank() == pp && groups.pp->size() == topology.pp_size);
  return groups;
}

ProcessGroups SingleRank() {
  ProcessGroups groups;
  groups.tp = NewSelfCommunicator();
  groups.pp = NewSelfCommunicator();
  return groups;
}

}  // namespace trireme
