#include "parallel/peer_memory.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

absl::Status CheckMembers(const std::vector<int>& members, const std::vector<std::string>& hosts) {
  if (members.size() < 2) return absl::UnavailableError("a group of one has no peers");
  if (members.size() > kMaxPeerRanks) {
    return absl::UnavailableError(
        absl::StrCat("a group of ", members.size(), " ranks; ", kMaxPeerRanks, " at most"));
  }
  for (const int member : members) {
    if (hosts[member] != hosts[members[0]]) {
      return absl::UnavailableError(absl::StrCat("ranks ", members[0], " and ", member,
                                                 " are on different hosts (", hosts[members[0]],
                                                 ", ", hosts[member], ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PeerMapping>> PeerMapping::Create(ControlPlane& control,
                                                                 const std::vector<int>& members,
                                                                 const Make& make) {
  RETURN_IF_ERROR(control.Agree(CheckMembers(members, control.AllGather(control.host()))));
  absl::StatusOr<std::unique_ptr<PeerMemory>> memory = make();
  RETURN_IF_ERROR(control.Agree(memory.status()));
  const std::vector<std::string> offered = control.AllGather((*memory)->handle());
  std::vector<std::string> handles;
  for (const int member : members) handles.push_back(offered[member]);
  const auto rank = std::find(members.begin(), members.end(), control.rank()) - members.begin();
  const absl::Status opened = (*memory)->Open(static_cast<int>(rank), handles);
  // From here on it is closed everywhere before it is freed anywhere.
  std::unique_ptr<PeerMapping> mapping(new PeerMapping(control, *std::move(memory)));
  RETURN_IF_ERROR(control.Agree(opened));
  return mapping;
}

PeerMapping::~PeerMapping() {
  memory_->Close();
  if (control_.JobStatus().ok()) control_.Barrier();  // nobody comes to it after a failure
}

}  // namespace trireme
