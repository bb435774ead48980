// The checks of launch/doctor_checks.h that compare ranks and hosts.

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "launch/doctor_checks.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr size_t kNamesInALine = 8;

// "0, 1, 2 and 61 more"
template <typename Container>
std::string SomeOf(const Container& all) {
  const size_t shown = std::min(all.size(), kNamesInALine);
  std::string text = absl::StrJoin(all.begin(), std::next(all.begin(), shown), ", ");
  if (all.size() > shown) absl::StrAppend(&text, " and ", all.size() - shown, " more");
  return text;
}

// Whom a value belongs to that is not rank 0's.
std::string RanksOn(const std::vector<int>& ranks, const std::set<std::string>& hosts) {
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", SomeOf(ranks), " on ", SomeOf(hosts));
}

// Rank 0's program and MPI against everybody's.
Findings CheckSameProgram(const std::vector<RankReport>& reports) {
  Findings findings;
  struct Kind {
    const char* name;
    std::string RankReport::*field;
    const char* what;
    const char* remedy;
  };
  for (const Kind& kind :
       {Kind{"other-binary", &RankReport::program, "another build of this program",
             "install the same one on all hosts"},
        Kind{"other-mpi", &RankReport::mpi, "another Open MPI",
             "install the same version on all hosts, or correct LD_LIBRARY_PATH there"}}) {
    std::vector<int> ranks;
    std::set<std::string> hosts;
    const std::string& first = reports[0].*kind.field;
    std::string other;
    for (size_t rank = 1; rank < reports.size(); ++rank) {
      if (reports[rank].*kind.field == first) continue;
      if (other.empty()) other = reports[rank].*kind.field;
      ranks.push_back(static_cast<int>(rank));
      hosts.insert(reports[rank].host);
    }
    if (ranks.empty()) continue;
    findings.push_back(
        {Severity::kError, kind.name,
         absl::StrCat(RanksOn(ranks, hosts), ranks.size() == 1 ? " runs " : " run ", kind.what,
                      " (", other.substr(0, 12), ") than rank 0 on ", reports[0].host, " (",
                      first.substr(0, 12), "): ", kind.remedy)});
  }
  return findings;
}

// Files of rank 0's host against the others', by name.
Findings CheckSameCheckpoint(const std::vector<RankReport>& reports) {
  const auto by_name = [](const std::vector<std::string>& files) {
    std::map<std::string, std::string> map;
    for (const std::string& file : files) {
      const size_t space = file.find(' ');
      map[file.substr(0, space)] = space == std::string::npos ? "" : file.substr(space + 1);
    }
    return map;
  };
  const std::map<std::string, std::string> first = by_name(reports[0].checkpoint);
  Findings findings;
  std::set<std::string> seen = {reports[0].host};
  for (const RankReport& report : reports) {
    if (report.checkpoint.empty() || !seen.insert(report.host).second) continue;
    const std::map<std::string, std::string> other = by_name(report.checkpoint);
    std::vector<std::string> missing, different;
    for (const auto& [name, identity] : first) {
      const auto it = other.find(name);
      if (it == other.end()) {
        missing.push_back(name);
      } else if (it->second != identity) {
        different.push_back(name);
      }
    }
    for (const auto& [name, identity] : other) {
      if (first.count(name) == 0) different.push_back(name);
    }
    if (missing.empty() && different.empty()) continue;
    const std::string what =
        missing.empty()
            ? absl::StrCat("has another ", SomeOf(different), " than ", reports[0].host)
            : absl::StrCat("lacks ", SomeOf(missing), ", which ", reports[0].host, " has");
    findings.push_back({Severity::kError, "other-checkpoint",
                        absl::StrCat("host ", report.host, " ", what,
                                     " in the model's folder: copy the model there again, or use a "
                                     "folder that all hosts share")});
  }
  return findings;
}

// Hosts that share no subnet with rank 0's may still have a route: a warning.
Findings CheckCommonNetwork(const std::vector<RankReport>& reports) {
  std::set<std::string> apart;
  for (const RankReport& report : reports) {
    if (report.host == reports[0].host) continue;
    const bool common = std::any_of(
        report.networks.begin(), report.networks.end(), [&](const std::string& network) {
          const auto& mine = reports[0].networks;
          return std::find(mine.begin(), mine.end(), network) != mine.end();
        });
    if (!common) apart.insert(report.host);
  }
  if (apart.empty()) return {};
  return {{Severity::kWarning, "no-common-network",
           absl::StrCat(SomeOf(apart), " and ", reports[0].host,
                        " have no subnet in common, so what they send is routed: if that is not "
                        "meant, set OMPI_MCA_btl_tcp_if_include to the network between them")}};
}

Findings CheckGpus(const std::vector<RankReport>& reports, const JobPlan& plan) {
  struct Host {
    int64_t ranks = 0;
    std::set<std::string> gpus;
  };
  std::map<std::string, Host> hosts;
  for (const RankReport& report : reports) {
    Host& host = hosts[report.host];
    host.ranks += plan.ahead && !plan.hostfile ? plan.ranks() : 1;
    host.gpus.insert(report.gpus.begin(), report.gpus.end());
  }
  Findings findings;
  for (const auto& [name, host] : hosts) {
    const int gpus = static_cast<int>(host.gpus.size());
    if (host.ranks <= gpus || (plan.shared_gpus && gpus > 0)) continue;
    findings.push_back(
        {Severity::kError, "gpus",
         absl::StrCat("host ", name, " has ", host.ranks, host.ranks == 1 ? " rank" : " ranks",
                      " and ", host.gpus.size(),
                      " GPUs they may use: start fewer ranks there (mpirun --map-by ppr:N:node, "
                      "srun --ntasks-per-node=N), correct CUDA_VISIBLE_DEVICES, or share them with "
                      "--allow-shared-gpu")});
  }
  return findings;
}

}  // namespace

std::string Serialize(const RankReport& report) {
  ByteWriter out;
  for (const std::string& text : {report.host, report.program, report.mpi}) out.PutString(text);
  for (const auto* list : {&report.checkpoint, &report.networks, &report.gpus})
    out.PutString(absl::StrJoin(*list, "\n"));
  return out.Take();
}

RankReport ParseRankReport(const std::string& bytes) {
  ByteReader in(bytes);
  RankReport report;
  for (std::string* text : {&report.host, &report.program, &report.mpi}) *text = in.GetString();
  for (auto* list : {&report.checkpoint, &report.networks, &report.gpus})
    *list = absl::StrSplit(in.GetString(), '\n', absl::SkipEmpty());
  return report;
}

std::vector<std::string> NetworksOf(const Environment& environment) {
  std::vector<std::string> networks;
  for (const NetworkInterface& interface : environment.interfaces) {
    const std::vector<std::string> parts = absl::StrSplit(interface.address, '.');
    uint32_t address = 0;
    for (const std::string& part : parts) {
      uint32_t byte = 0;
      if (!absl::SimpleAtoi(part, &byte) || byte > 255) byte = 0;
      address = address << 8 | byte;
    }
    if (parts.size() != 4 || parts[0] == "127" || IsVirtualBridge(interface.name)) continue;
    const int bits = std::clamp(interface.prefix_bits, 0, 32);
    const uint32_t network = bits == 0 ? 0 : address & (~uint32_t{0} << (32 - bits));
    networks.push_back(absl::StrFormat("%d.%d.%d.%d/%d", network >> 24, network >> 16 & 255,
                                       network >> 8 & 255, network & 255, bits));
  }
  return networks;
}

Findings CheckJob(const std::vector<RankReport>& reports, const JobPlan& plan) {
  Findings findings;
  if (reports.empty()) return findings;
  const auto add = [&findings](const Findings& more) {
    findings.insert(findings.end(), more.begin(), more.end());
  };
  add(CheckSameProgram(reports));
  add(CheckSameCheckpoint(reports));
  add(CheckCommonNetwork(reports));
  if (plan.cuda) add(CheckGpus(reports, plan));
  return findings;
}

}  // namespace trireme
