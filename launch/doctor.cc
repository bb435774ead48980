#include "launch/doctor.h"

#include <elf.h>
#include <link.h>
#include <netdb.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda_module.h"
#include "kernels/status.h"
#include "launch/placement.h"
#include "launch/session.h"
#include "models/checkpoint_identity.h"
#include "models/weights.h"
#include "nlohmann/json.hpp"
#include "runtime/wire.h"

namespace trireme {
namespace {

// The linker's build id of this program: equal for equal code only.
std::string BuildId() {
  std::string id = "unknown";
  const auto visit = [](dl_phdr_info* info, size_t, void* out) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr)& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_NOTE) continue;
      const char* next = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
      const char* const end = next + segment.p_memsz;
      while (next + sizeof(ElfW(Nhdr)) <= end) {
        const auto* note = reinterpret_cast<const ElfW(Nhdr)*>(next);
        const char* const name = next + sizeof(*note);
        const char* const content = name + (note->n_namesz + 3) / 4 * 4;
        if (note->n_type == NT_GNU_BUILD_ID && absl::string_view(name, 3) == "GNU") {
          *static_cast<std::string*>(out) =
              absl::BytesToHexString(absl::string_view(content, note->n_descsz));
          return 1;
        }
        next = content + (note->n_descsz + 3) / 4 * 4;
      }
    }
    return 1;  // the first object is the program; no other one counts
  };
  dl_iterate_phdr(visit, &id);
  return id;
}

// What a rank sends to rank 0. The first message of a job, and maybe between different builds.
struct Statement {
  RankReport report;
  Findings findings;  // of its host; from the first rank of each only
};

std::string Pack(const Statement& statement) {
  ByteWriter out;
  out.PutString(Serialize(statement.report));
  out.Put(static_cast<uint64_t>(statement.findings.size()));
  for (const Finding& finding : statement.findings) {
    out.Put(finding.severity);
    out.PutString(finding.name);
    out.PutString(finding.text);
  }
  return out.Take();
}

Statement Unpack(const std::string& bytes) {
  ByteReader in(bytes);
  Statement statement;
  statement.report = ParseRankReport(in.GetString());
  for (uint64_t left = in.Get<uint64_t>(); left > 0; --left) {
    Finding finding;
    finding.severity = in.Get<Severity>();
    finding.name = in.GetString();
    finding.text = in.GetString();
    statement.findings.push_back(std::move(finding));
  }
  return statement;
}

Statement StatementOf(ControlPlane& control, const Environment& environment, const JobPlan& plan,
                      const std::string& model_dir, bool look_for_nccl) {
  Statement out;
  out.report.host = control.host();
  out.report.program = BuildId();
  out.report.mpi = environment.mpi_loaded;
  const bool several_hosts = control.local_size() < control.size();
  if (several_hosts) out.report.networks = NetworksOf(environment);
  if (several_hosts && control.local_rank() == 0 && !model_dir.empty())
    out.report.checkpoint = CheckpointIdentity(model_dir);
  if (plan.cuda) {
    for (const Gpu& gpu : VisibleGpus(environment)) out.report.gpus.push_back(gpu.pci_address);
    // Each of these tasks sees its own GPU only, and all call it number 0.
    if (environment.Has("SLURM_GPUS_PER_TASK") && out.report.gpus.size() == 1)
      out.report.gpus[0] = absl::StrCat("of task ", control.rank());
  }
  if (control.local_rank() == 0) {
    out.findings =
        CheckHost(environment, plan, control.local_size(), control.size(), look_for_nccl);
    // The doctor's alone: a job that starts opens the GPU in any case, and says the same.
    if (plan.cuda && look_for_nccl && !HasError(out.findings)) {
      if (const absl::Status usable = CudaDevices().status(); !usable.ok()) {
        out.findings.push_back({Severity::kError, "unusable-gpu", std::string(usable.message())});
      }
    }
  }
  if (!plan.cuda) return out;
  const std::optional<Placement> placement = PlacementOf(environment, control.local_rank(), "");
  if (placement && AllowedCores(*placement).empty()) {
    out.findings.push_back(
        {Severity::kWarning, "far-gpu",
         absl::StrCat(
             "rank ", control.rank(), " is bound to cores away from its GPU ", placement->gpu,
             " (NUMA node ", placement->numa_node,
             "), which slows its copies: start with --bind-to none (srun: --cpu-bind=none)")});
  }
  return out;
}

// What several hosts have alike is said once; of what only some have, the line names them.
Findings MergeHosts(const std::vector<Statement>& statements) {
  std::set<std::string> hosts;
  std::map<std::string, std::set<std::string>> where;  // by line
  for (const Statement& statement : statements) {
    hosts.insert(statement.report.host);
    for (const Finding& finding : statement.findings)
      where[finding.Line()].insert(statement.report.host);
  }
  Findings merged;
  for (const Statement& statement : statements) {
    for (Finding finding : statement.findings) {
      const auto it = where.find(finding.Line());
      if (it == where.end()) continue;  // said already
      if (it->second.size() < hosts.size())
        finding.text = absl::StrCat("host ", absl::StrJoin(it->second, ", "), ": ", finding.text);
      where.erase(it);
      merged.push_back(std::move(finding));
    }
  }
  return merged;
}

struct Examination {
  Findings findings;  // on rank 0
  size_t hosts = 1;
};

// Collective.
Examination Examine(ControlPlane& control, const Environment& environment, const JobPlan& plan,
                    const std::string& model_dir, bool look_for_nccl) {
  const std::string mine = Pack(StatementOf(control, environment, plan, model_dir, look_for_nccl));
  std::vector<Statement> statements;
  for (const std::string& bytes : control.Gather(mine)) statements.push_back(Unpack(bytes));
  Examination result;
  result.findings = MergeHosts(statements);
  std::vector<RankReport> reports;
  std::set<std::string> hosts;
  for (Statement& statement : statements) {
    hosts.insert(statement.report.host);
    reports.push_back(std::move(statement.report));
  }
  result.hosts = hosts.size();
  // Counting GPUs that cannot be used anyway would only be a second line for the same fault.
  JobPlan rest = plan;
  rest.cuda = plan.cuda && !HasError(result.findings);
  for (Finding& finding : CheckJob(reports, rest)) result.findings.push_back(std::move(finding));
  return result;
}

bool HostIsKnown(const std::string& host) {
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, nullptr, &found);
  if (error == 0) freeaddrinfo(found);
  return error == 0;
}

Findings CheckHostfileOf(const DoctorFlags& flags, const Environment& environment,
                         const JobPlan& plan) {
  if (flags.hostfile.empty()) return {};
  const absl::StatusOr<std::string> text = ReadFile(flags.hostfile);
  if (!text.ok()) {
    return {{Severity::kError, "hostfile",
             absl::StrCat("--hostfile ", std::string(text.status().message()))}};
  }
  const int64_t with_slot = MayOversubscribe(environment) ? 0 : plan.ranks();
  return CheckHostfile(flags.hostfile, *text, with_slot, &HostIsKnown);
}

// All that loading would say before it reads a weight.
absl::Status CheckWeights(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(model_dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightLoader> loader, WeightLoader::Open(model_dir));
  return loader->Check(AllWeightSpecs(config));
}

// Of the model's folder and the layout, by rank 0.
Findings CheckModel(const DoctorFlags& flags, int ranks) {
  if (flags.model_dir.empty()) return {};
  ModelFlags model;
  model.model_dir = flags.model_dir;
  model.tp = flags.tp, model.pp = flags.pp, model.dp = flags.dp;
  absl::Status status = ChooseTopology(ranks, model).status();
  if (status.ok()) status = CheckWeights(flags.model_dir);
  if (status.ok()) return {};
  return {{Severity::kError, "model", std::string(status.message())}};
}

void PrintText(const Environment& environment, const std::string& started,
               const Findings& findings) {
  std::string out =
      absl::StrCat("trireme ", TRIREME_VERSION, ", build ", BuildId().substr(0, 12), ", Open MPI ",
                   environment.mpi_loaded, ", on ", environment.host, "\nstarted ", started, "\n");
  int errors = 0;
  for (const Finding& finding : findings) {
    const bool error = finding.severity == Severity::kError;
    errors += error;
    absl::StrAppend(&out, error ? "error: " : "warning: ", finding.Line(), "\n");
  }
  absl::StrAppend(&out,
                  errors > 0         ? "This job cannot work."
                  : findings.empty() ? "Nothing is wrong."
                                     : "Nothing stops this job.",
                  "\n");
  std::fputs(out.c_str(), stdout);
}

void PrintJson(const Environment& environment, const std::string& started,
               const Findings& findings) {
  nlohmann::ordered_json out = {
      {"version", TRIREME_VERSION}, {"build", BuildId()}, {"started", started}};
  out["findings"] = nlohmann::ordered_json::array();
  for (const Finding& finding : findings) {
    out["findings"].push_back(
        {{"severity", finding.severity == Severity::kError ? "error" : "warning"},
         {"name", finding.name},
         {"text", finding.text}});
  }
  out["environment"] = nlohmann::ordered_json::parse(EnvironmentToJson(environment));
  const auto replace = nlohmann::ordered_json::error_handler_t::replace;  // what is no UTF-8
  std::fputs((out.dump(2, ' ', false, replace) + "\n").c_str(), stdout);
}

// GPUs are looked at when they are asked for, or there; in the latter case a fault of theirs is no
// reason not to run on the CPU.
bool WantsGpus(const DoctorFlags& flags, const Environment& environment) {
  return flags.device == "cuda" ||
         (flags.device == "auto" && environment.cuda_runtime > 0 && !environment.gpus.empty());
}

void SoftenGpuFindings(const DoctorFlags& flags, Findings* findings) {
  if (flags.device == "cuda") return;
  const std::set<std::string> of_gpus = {"no-driver",  "old-driver", "no-nccl",
                                         "other-nccl", "gpus",       "unusable-gpu"};
  for (Finding& finding : *findings) {
    if (of_gpus.count(finding.name) != 0) finding.severity = Severity::kWarning;
  }
}

}  // namespace

void LetOthersSpeak() { std::this_thread::sleep_for(std::chrono::seconds(2)); }

int SayWhyNotStarted(const Environment& environment) {
  const Launch launch = IdentifyLaunch(environment);
  bool spoke = false;
  for (const Finding& finding : CheckLaunch(environment)) {
    if (finding.severity != Severity::kError) continue;
    if (finding.of_host ? launch.local_rank != 0 : launch.rank != 0) continue;
    std::fprintf(stderr, "trireme: %s\n", finding.Line().c_str());
    spoke = true;
  }
  if (!spoke) LetOthersSpeak();
  return 1;
}

absl::Status CheckOneWorld(const ControlPlane& control, const Environment& environment) {
  // Each of the singletons is rank 0 of its own world; one line is enough.
  for (const Finding& finding : CheckWorldSize(environment, control.size())) {
    if (IdentifyLaunch(environment).rank == 0) return absl::FailedPreconditionError(finding.Line());
    LetOthersSpeak();
    return absl::FailedPreconditionError("");
  }
  return absl::OkStatus();
}

absl::Status CheckAtStart(ControlPlane& control, const Environment& environment,
                          const ModelFlags& flags) {
  const JobPlan plan{.tp = flags.tp,
                     .pp = flags.pp,
                     .dp = flags.dp,
                     .cuda = flags.device == "cuda",
                     .shared_gpus = flags.allow_shared_gpu};
  for (const Finding& finding : CheckRankCount(plan, control.size()))
    return UsageError(finding.Line());
  std::vector<std::string> lines;
  for (const Finding& finding :
       Examine(control, environment, plan, flags.model_dir, /*look_for_nccl=*/false).findings) {
    if (finding.severity == Severity::kError) lines.push_back(finding.Line());
  }
  return control.Agree(lines.empty()
                           ? absl::OkStatus()
                           : absl::FailedPreconditionError(absl::StrJoin(lines, "\ntrireme: ")));
}

int RunDoctor(ControlPlane* control, const Environment& environment, const DoctorFlags& flags) {
  const Launch launch = IdentifyLaunch(environment);
  const JobPlan plan{.tp = flags.tp,
                     .pp = flags.pp,
                     .dp = flags.dp,
                     .cuda = WantsGpus(flags, environment),
                     .hostfile = !flags.hostfile.empty(),
                     .ahead = launch.launcher == Launcher::kAlone};
  const auto add = [](Findings more, Findings* findings) {
    for (Finding& finding : more) findings->push_back(std::move(finding));
  };
  Findings findings = CheckLaunch(environment);
  std::string started = Describe(launch);
  // What only this host has, rank 0 may not know of.
  const bool of_host = std::any_of(findings.begin(), findings.end(),
                                   [](const Finding& finding) { return finding.of_host; });
  bool speaks = launch.rank == 0 || (of_host && launch.local_rank == 0);
  if (control != nullptr) {
    speaks = control->rank() == 0 && speaks;
    add(CheckWorldSize(environment, control->size()), &findings);
    Examination job = Examine(*control, environment, plan, flags.model_dir, true);
    add(std::move(job.findings), &findings);
    absl::StrAppend(&started, " (", control->size(), control->size() == 1 ? " rank" : " ranks",
                    " on ", job.hosts, job.hosts == 1 ? " host)" : " hosts)");
  }
  int failed = 0;
  if (!speaks && (control == nullptr || control->size() == 1)) LetOthersSpeak();
  if (speaks) {
    // On its own the doctor looks at the job that is to be started; else at the one it is part of.
    const int ranks = static_cast<int>(plan.ahead ? std::min<int64_t>(plan.ranks(), 1 << 24)
                                       : control != nullptr ? control->size()
                                                            : 1);
    if (plan.ahead) add(CheckMpirun(environment, plan), &findings);
    if (!plan.ahead && control != nullptr) add(CheckRankCount(plan, ranks), &findings);
    add(CheckHostfileOf(flags, environment, plan), &findings);
    if (!HasError(findings)) add(CheckModel(flags, ranks), &findings);
    SoftenGpuFindings(flags, &findings);
    flags.json ? PrintJson(environment, started, findings)
               : PrintText(environment, started, findings);
    failed = std::fflush(stdout) != 0 || HasError(findings);
  }
  // A rank that leaves with another status than rank 0 would be reported as the one that failed.
  if (control != nullptr && control->size() > 1)
    failed = control->Agree(failed ? absl::UnknownError("") : absl::OkStatus()).ok() ? 0 : 1;
  return control == nullptr ? 1 : failed;
}

}  // namespace trireme
