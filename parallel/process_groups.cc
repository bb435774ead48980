#include "parallel/process_groups.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "parallel/mpi_communicator.h"
#include "parallel/mpi_environment.h"
#include "parallel/nccl_module.h"
#include "parallel/peer_memory.h"
#include "parallel/staged_communicator.h"

namespace trireme {
namespace {

// Whether any two ranks use one GPU; InvalidArgument names them when they may not.
absl::StatusOr<bool> AnyGpuIsShared(ControlPlane& control, const Device& device, bool allowed) {
  std::vector<std::string> names =
      control.AllGather(absl::StrCat(control.host(), " ", device.spec().identity));
  for (size_t a = 0; a < names.size(); ++a) {
    for (size_t b = a + 1; b < names.size(); ++b) {
      if (names[a] != names[b]) continue;
      if (allowed) return true;
      return absl::InvalidArgumentError(
          absl::StrCat("ranks ", a, " and ", b, " are on one GPU (", names[a],
                       "): start one rank a GPU, or give --allow-shared-gpu (slow, for tests)"));
    }
  }
  return false;
}

// The communicator for device memory of the group of world ranks `members`, out of the one for host
// memory. Collective over the world.
absl::StatusOr<std::unique_ptr<Communicator>> ForDevice(std::unique_ptr<Communicator> host,
                                                        ControlPlane& control, Device& device,
                                                        const std::vector<int>& members, bool nccl,
                                                        NcclGroup group) {
  if (host->size() == 1) return host;  // moves nothing
  if (!nccl) return NewStagedCommunicator(std::move(host));
  const absl::StatusOr<NcclIds> mine = MakeNcclIds();
  RETURN_IF_ERROR(control.Agree(mine.status()));
  const std::vector<std::string> offered =
      control.AllGather(std::string(reinterpret_cast<const char*>(&*mine), sizeof(NcclIds)));
  std::vector<NcclIds> ids(members.size());
  for (size_t i = 0; i < members.size(); ++i) {
    CHECK_EQ(offered[members[i]].size(), sizeof(NcclIds));
    std::memcpy(&ids[i], offered[members[i]].data(), sizeof(NcclIds));
  }
  group.rank = host->rank();
  group.size = host->size();
  group.ids = ids.data();
  ASSIGN_OR_RETURN(std::unique_ptr<Communicator> made, NewNcclCommunicator(group, device));
  made->RecordWith(control.recorder(), host->group());
  return made;
}

}  // namespace

absl::StatusOr<ProcessGroups> CreateProcessGroups(ControlPlane& control, const Topology& topology,
                                                  Device& device,
                                                  const ProcessGroupOptions& options) {
  CHECK_EQ(topology.world_size(), control.size());
  ProcessGroups groups;
  groups.topology = topology;
  groups.rank = control.rank();
  // A color is the rank of the group's first member, so it is unique among the groups of an axis.
  const int dp = groups.dp_index(), pp = groups.pp_index(), tp = groups.tp_index();
  const bool host_memory = device.spec().host_memory;
  const auto tp_group = [&] {
    return NewMpiCommunicator(control, topology.RankOf(dp, pp, 0),
                              {.any_stream = !host_memory, .name = "tp"});
  };
  groups.tp = tp_group();
  groups.pp = NewMpiCommunicator(control, topology.RankOf(dp, 0, tp),
                                 {.any_stream = !host_memory, .name = "pp"});
  CHECK(groups.tp->rank() == tp && groups.tp->size() == topology.tp_size);
  CHECK(groups.pp->rank() == pp && groups.pp->size() == topology.pp_size);
  if (host_memory) return groups;

  ASSIGN_OR_RETURN(const bool shared, AnyGpuIsShared(control, device, options.allow_shared_gpu));
  const bool nccl = options.collectives == Collectives::kNccl ||
                    (options.collectives == Collectives::kAuto && !shared);
  if (shared && nccl) LetNcclShareGpus(control.rank());
  groups.host_tp = tp_group();
  std::vector<int> tp_members, pp_members;
  for (int i = 0; i < topology.tp_size; ++i) tp_members.push_back(topology.RankOf(dp, pp, i));
  for (int i = 0; i < topology.pp_size; ++i) pp_members.push_back(topology.RankOf(dp, i, tp));
  NcclGroup tp_nccl{.collectives = true, .shared_gpu = shared};
  if (nccl && options.collectives == Collectives::kAuto) {
    // Where it cannot be had, NCCL moves everything.
    auto peers =
        PeerMapping::Create(control, tp_members, [&device] { return NewCudaPeerMemory(device); });
    RETURN_IF_ERROR(control.JobStatus());
    if (peers.ok()) tp_nccl.peers = *std::move(peers);
    tp_nccl.peer_way = options.peer_way;
  }
  // tp_nccl stays: giving the mapping back is collective, and so not for a rank that fails alone.
  absl::StatusOr<std::unique_ptr<Communicator>> made =
      ForDevice(std::move(groups.tp), control, device, tp_members, nccl, tp_nccl);
  RETURN_IF_ERROR(control.Agree(made.status()));
  groups.tp = *std::move(made);
  made = ForDevice(std::move(groups.pp), control, device, pp_members, nccl,
                   {.collectives = false, .pipeline = true, .shared_gpu = shared});
  RETURN_IF_ERROR(control.Agree(made.status()));
  groups.pp = *std::move(made);
  for (Communicator* const group : {groups.tp.get(), groups.pp.get()}) {
    if (nccl && group->size() > 1) groups.watches.emplace_back(control.detector(), group);
  }
  return groups;
}

ProcessGroups SingleRank() {
  ProcessGroups groups;
  groups.tp = NewSelfCommunicator();
  groups.pp = NewSelfCommunicator();
  return groups;
}

}  // namespace trireme
