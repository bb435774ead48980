#include "launch/device_choice.h"

#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace trireme {
namespace {

DeviceChoice Cpu(const std::string& why) {
  return {"cpu", absl::StrCat("--device auto takes the CPU: ", why)};
}

}  // namespace

DeviceChoice ChooseDevice(const std::vector<GpusOfRank>& ranks, bool allow_shared_gpu) {
  struct Host {
    size_t ranks = 0;
    std::set<std::string> gpus;
  };
  std::map<std::string, Host> hosts;
  bool any = false;
  const GpusOfRank* without = nullptr;
  for (const GpusOfRank& rank : ranks) {
    Host& host = hosts[rank.host];
    ++host.ranks;
    host.gpus.insert(rank.gpus.begin(), rank.gpus.end());
    any = any || !rank.gpus.empty();
    if (rank.gpus.empty() && (without == nullptr || without->why_none.empty())) without = &rank;
  }
  if (without != nullptr) {
    if (!without->why_none.empty()) {
      return Cpu(absl::StrCat("host ", without->host, ": ",
                              absl::StripPrefix(without->why_none, "--device cuda: ")));
    }
    // A machine without GPUs takes the CPU and says nothing of it.
    if (!any) return {"cpu", ""};
    return Cpu(absl::StrCat("host ", without->host, " has no NVIDIA driver, and others have"));
  }
  for (const auto& [name, host] : hosts) {
    if (allow_shared_gpu || host.ranks <= host.gpus.size()) continue;
    return Cpu(absl::StrCat("host ", name, " has ", host.ranks, " ranks and ", host.gpus.size(),
                            host.gpus.size() == 1 ? " GPU" : " GPUs",
                            " they can use: start fewer ranks there, or share GPUs with "
                            "--allow-shared-gpu"));
  }
  return {"cuda", ""};
}

}  // namespace trireme
