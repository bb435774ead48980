// The checks of launch/doctor_checks.h that look ahead, at an mpirun that is to be started.

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "launch/doctor_checks.h"

namespace trireme {
namespace {

// What mpirun may start without --oversubscribe: as many as cores, or what Slurm gave the job.
int64_t SlotsOf(const Environment& environment) {
  const std::vector<int> tasks = TasksPerNode(environment.Variable("SLURM_TASKS_PER_NODE"));
  const int cores = environment.physical_cores > 0 ? environment.physical_cores : environment.cores;
  return tasks.empty() ? cores : std::accumulate(tasks.begin(), tasks.end(), int64_t{0});
}

// Of "mpirun (Open MPI) 4.1.4", or of the runtime inside it, "prterun (PRRTE) 3.0.2", or of IBM's
// Spectrum MPI, which is made of it. Those of others start ranks that do not find each other. One
// that says nothing may be anybody's.
bool IsForeignMpirun(const Environment& environment) {
  const std::string& version = environment.mpirun_version;
  if (environment.mpi_loaded.empty()) return false;
  if (absl::StripAsciiWhitespace(version).empty()) return false;
  for (const char* name : {"Open MPI", "OpenRTE", "PRRTE", "Spectrum MPI"}) {
    if (absl::StrContains(version, name)) return false;
  }
  return true;
}

// "HYDRA build details:" of MPICH.
std::string FirstLine(const std::string& text) {
  const std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipWhitespace());
  return lines.empty() ? "" : absl::CHexEscape(absl::StripAsciiWhitespace(lines[0]).substr(0, 80));
}

// The mpirun of Open MPI 5 reads the same two.
bool MayRunAsRoot(const Environment& environment) {
  return environment.Has("OMPI_ALLOW_RUN_AS_ROOT") &&
         environment.Has("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM");
}

// Open MPI 4 and 5 have these names for slots and, with "max" before or after and "-" or "_" in
// between, for their limit.
constexpr std::array<const char*, 3> kSlots = {"slots", "cpu", "count"};

bool MeansSlots(const std::string& word) {
  return std::find(kSlots.begin(), kSlots.end(), word) != kSlots.end();
}

bool MeansMostSlots(const std::string& word) {
  for (const char* name : kSlots) {
    for (const char* between : {"-", "_"}) {
      if (word == absl::StrCat("max", between, name) || word == absl::StrCat(name, between, "max"))
        return true;
    }
  }
  return false;
}

// Of a line's words after the host.
struct HostfileSlots {
  std::optional<int64_t> slots;  // none: as many as cores, which only the host knows
  std::string fault;             // of the line; empty: none
};

HostfileSlots SlotsOfLine(const std::vector<std::string>& words) {
  HostfileSlots out;
  std::optional<int64_t> most;
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string& name = words[i];
    if (!MeansSlots(name) && !MeansMostSlots(name)) continue;
    const bool equals = i + 1 < words.size() && words[i + 1] == "=";
    const std::string value = equals && i + 2 < words.size() ? words[i + 2] : "";
    int count = 0;
    if (!absl::SimpleAtoi(value, &count) || count <= 0) {
      out.fault = absl::StrCat("\"", name, equals ? "=" : "", value,
                               "\" is no number of slots: write ", name, "=N");
      return out;
    }
    if (MeansSlots(name)) {
      out.slots = count;
    } else if (out.slots.value_or(0) > count) {
      out.fault = absl::StrCat("\"", name, "=", count, "\" is less than the ", *out.slots,
                               " slots before it: raise it, or leave it out");
      return out;
    } else {
      most = count;
    }
  }
  // A limit alone is the number too.
  if (!out.slots) out.slots = most;
  return out;
}

}  // namespace

bool MayOversubscribe(const Environment& environment) {
  const std::string& flag = environment.Variable("OMPI_MCA_rmaps_base_oversubscribe");
  const std::string policy =
      absl::AsciiStrToLower(environment.Variable("PRTE_MCA_rmaps_default_mapping_policy"));
  return flag == "1" || absl::StartsWithIgnoreCase(flag, "t") ||
         absl::StartsWithIgnoreCase(flag, "y") || absl::StrContains(policy, "oversubscribe");
}

Findings CheckMpirun(const Environment& environment, const JobPlan& plan) {
  Findings findings;
  // Without a plan of several ranks these are only things to know.
  const int64_t ranks = plan.ranks();
  const auto add = [&findings, ranks](const char* name, std::string text) {
    findings.push_back({ranks > 1 ? Severity::kError : Severity::kWarning, name, std::move(text)});
  };
  if (environment.mpirun.empty()) {
    add("no-mpirun",
        "mpirun is not on PATH, so only one rank can be started: install openmpi-bin (Debian, "
        "Ubuntu) or load the cluster's Open MPI module");
    return findings;
  }
  if (IsForeignMpirun(environment)) {
    add("foreign-mpirun",
        absl::StrCat(environment.mpirun, " is not Open MPI's mpirun (it says \"",
                     FirstLine(environment.mpirun_version),
                     "\"), so each rank would run alone: install openmpi-bin (Debian, Ubuntu) or "
                     "load the cluster's Open MPI module, and put its mpirun first on PATH"));
    return findings;  // the rest is about Open MPI's
  }
  if (environment.user_id == 0 && !MayRunAsRoot(environment)) {
    add("root",
        "mpirun refuses to run as root: use another user, or export OMPI_ALLOW_RUN_AS_ROOT=1 "
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1");
  }
  const int64_t slots = SlotsOf(environment);
  if (slots > 0 && ranks > slots && !plan.hostfile && !MayOversubscribe(environment)) {
    add("slots", absl::StrCat("mpirun has ", slots, " slots here and ", ranks,
                              " ranks are wanted: add --oversubscribe (slower), or --hostfile with "
                              "more hosts"));
  }
  const bool stale = environment.Has("SLURM_JOB_ID") &&
                     (environment.srun.empty() ||
                      (environment.Has("SLURM_TASK_PID") && !environment.slurm_task_is_ours));
  if (stale) {
    add("stale-slurm",
        absl::StrCat("SLURM_* variables of job ", environment.Variable("SLURM_JOB_ID"),
                     " are set, but ",
                     environment.srun.empty() ? "there is no srun on PATH"
                                              : "Slurm did not start this process",
                     environment.container ? " (a container inherited them)" : "",
                     ", and mpirun would ask Slurm to start the ranks: unset ${!SLURM_*}"));
  }
  return findings;
}

Findings CheckHostfile(const std::string& path, const std::string& text, int64_t ranks,
                       bool (*known)(const std::string& host)) {
  Findings findings;
  int64_t slots = 0;
  bool all_say = true;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    // "slots = 4" too.
    const std::string spaced = absl::StrReplaceAll(line.substr(0, line.find('#')), {{"=", " = "}});
    const std::vector<std::string> words =
        absl::StrSplit(spaced, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    const std::string where = absl::StrCat(path, ":", number, ": ");
    // "user@host" is for ssh.
    const std::string host = words[0].substr(words[0].find('@') + 1);
    if (!known(host)) {
      findings.push_back({Severity::kError, "unknown-host",
                          absl::StrCat(where, "host \"", host,
                                       "\" has no address: correct the name, or add it to DNS or "
                                       "/etc/hosts")});
    }
    const HostfileSlots of_line = SlotsOfLine(words);
    if (!of_line.fault.empty())
      findings.push_back({Severity::kError, "hostfile", absl::StrCat(where, of_line.fault)});
    all_say = all_say && of_line.slots.has_value();
    slots += of_line.slots.value_or(0);
  }
  if (all_say && ranks > slots && !HasError(findings)) {
    findings.push_back({Severity::kError, "slots",
                        absl::StrCat(path, " has ", slots, " slots in all and ", ranks,
                                     " ranks are wanted: raise slots=N, or add hosts")});
  }
  return findings;
}

}  // namespace trireme
