#include "launch/placement.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <climits>
#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace trireme {
namespace {

constexpr int kMostCores = CPU_SETSIZE;

}  // namespace

std::vector<int> ParseCoreList(const std::string& text) {
  std::vector<int> cores;
  for (absl::string_view part :
       absl::StrSplit(absl::StripAsciiWhitespace(text), ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> ends =
        absl::StrSplit(part, absl::MaxSplits('-', 1));
    int first = 0, last = 0;
    if (!absl::SimpleAtoi(ends.first, &first)) return {};
    last = first;
    if (part.size() > ends.first.size() && !absl::SimpleAtoi(ends.second, &last)) return {};
    if (first < 0 || last < first || last >= kMostCores) return {};
    for (int core = first; core <= last; ++core) cores.push_back(core);
  }
  return cores;
}

std::optional<Placement> PlacementOf(const Environment& environment, int local_rank,
                                     const std::string& root) {
  const std::vector<Gpu> visible = VisibleGpus(environment);
  const size_t index = visible.size() == 1 ? 0 : static_cast<size_t>(local_rank);
  if (index >= visible.size() || visible[index].numa_node < 0) return std::nullopt;
  Placement placement{
      .gpu = visible[index].pci_address, .numa_node = visible[index].numa_node, .cores = {}};
  std::ifstream in(
      absl::StrCat(root, "/sys/devices/system/node/node", placement.numa_node, "/cpulist"));
  placement.cores = ParseCoreList(std::string(std::istreambuf_iterator<char>(in), {}));
  if (placement.cores.empty()) return std::nullopt;
  return placement;
}

std::vector<int> AllowedCores(const Placement& placement) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return {};
  std::vector<int> cores;
  for (const int core : placement.cores) {
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  }
  return cores;
}

bool BindTo(const Placement& placement) {
  const std::vector<int> cores = AllowedCores(placement);
  if (cores.empty()) return false;
  cpu_set_t chosen;
  CPU_ZERO(&chosen);
  for (const int core : cores) CPU_SET(core, &chosen);
  if (sched_setaffinity(0, sizeof(chosen), &chosen) != 0) return false;
  // Preferred, not bound: weights that do not fit there shall go to the other node, not fail. A
  // kernel without NUMA refuses, and then there is nothing to prefer.
  constexpr int kMostNodes = 1024, kBits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, kMostNodes / kBits> nodes{};
  if (placement.numa_node < kMostNodes) {
    nodes[placement.numa_node / kBits] = 1UL << placement.numa_node % kBits;
    syscall(SYS_set_mempolicy, MPOL_PREFERRED, nodes.data(), kMostNodes + 1);
  }
  return true;
}

}  // namespace trireme
