#include "launch/doctor_checks.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "parallel/nccl_fault.h"

namespace trireme {
namespace {

Finding Error(std::string name, std::string text) {
  return {Severity::kError, std::move(name), std::move(text)};
}
Finding Warning(std::string name, std::string text) {
  return {Severity::kWarning, std::move(name), std::move(text)};
}

// Variables that the launcher in charge sets to a number; anything else means that somebody else
// set them.
Findings CheckNumbers(const Environment& environment) {
  std::vector<const char*> names = {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                                    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
                                    "PMIX_RANK"};
  if (environment.Has("SLURM_STEP_ID") && !environment.Has("OMPI_COMM_WORLD_SIZE")) {
    names.insert(names.end(),
                 {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_PROCID", "SLURM_LOCALID"});
  }
  Findings findings;
  for (const char* name : names) {
    if (environment.Has(name) && environment.Number(name) < 0) {
      findings.push_back(Error(
          "garbage-variable",
          absl::StrCat(name, " is \"", absl::CHexEscape(environment.Variable(name).substr(0, 40)),
                       "\" and no launcher sets it so: unset ", name)));
    }
  }
  return findings;
}

// MPI_Init would end with a page about components, or crash.
Findings CheckComponents(const Environment& environment) {
  Findings findings;
  for (const auto& [variable, name] : environment.absent_mpi_components) {
    const bool folder = variable == "OPAL_PREFIX";
    const char* const info = absl::StartsWith(variable, "PMIX_") ? "pmix_info" : "ompi_info";
    findings.push_back(Error(
        "garbage-variable",
        absl::StrCat(
            variable, " names \"", absl::CHexEscape(name.substr(0, 40)), "\", ",
            folder ? "which does not exist: unset " : "which this Open MPI does not have: unset ",
            variable,
            folder ? ""
                   : absl::StrCat(", or name others of its components (", info, " lists them)"))));
  }
  return findings;
}

// MPI was tried with them.
Findings CheckRefusedVariables(const Environment& environment) {
  Findings findings;
  for (const std::string& name : environment.refused_mpi_variables) {
    const std::string& value = environment.Variable(name);
    findings.push_back(Error(
        "garbage-variable",
        absl::StrCat("MPI does not start with ", name, "=\"", absl::CHexEscape(value.substr(0, 40)),
                     "\": unset ", name, ", or correct it")));
  }
  return findings;
}

constexpr int64_t kLeastSessionBytes = 1 << 20;

// Open MPI 5 crashes without a folder for its files, mpirun ends with pages. A recorded environment
// may know of none.
Findings CheckSessionFolder(const Environment& environment) {
  const std::string& folder = environment.session_folder;
  if (folder.empty() || environment.session_free_bytes >= kLeastSessionBytes) return {};
  const std::string name = absl::CHexEscape(folder.substr(0, 80));
  const bool full = environment.session_free_bytes >= 0;
  Finding finding = Error(
      "session-folder",
      absl::StrCat("MPI keeps files of its own in ", name,
                   full ? ", which is full: free some of it, or set TMPDIR to another folder"
                        : ", which is no folder that this process may write: set TMPDIR to one, "
                          "as /tmp"));
  finding.of_host = true;
  return {finding};
}

// Tasks of a Slurm step that Open MPI cannot join.
Findings CheckSlurmStep(const Environment& environment, const Launch& launch) {
  if (launch.launcher != Launcher::kSlurmWithoutPmix) return {};
  if (environment.Has("SLURM_TASK_PID") && !environment.slurm_task_is_ours) {
    return {Error(
        "stale-slurm",
        absl::StrCat("the SLURM_* variables say that this is one of ", launch.ranks,
                     " tasks of job ", environment.Variable("SLURM_JOB_ID"),
                     ", but Slurm did not start this process",
                     environment.container ? " (it runs in a container that inherited them)" : "",
                     ": unset ${!SLURM_*} before starting it"))};
  }
  const std::string& type = environment.Variable("SLURM_MPI_TYPE");
  return {Error("srun-without-pmix",
                absl::StrCat("srun started ", launch.ranks,
                             " tasks with --mpi=", type.empty() ? "none" : type,
                             ", which Open MPI cannot use, so each would run alone: use srun "
                             "--mpi=pmix, or mpirun inside sbatch or salloc"))};
}

// Slurm's PMIx plugin has two ways to let ranks of several nodes wait for each other at the end of
// MPI_Init. With "tree", the usual one, many pass before all are there (Slurm 22.05: 97 % of the
// fences, with "ring" none), and Open MPI 4.1 crashes when a message comes before it is ready.
Findings CheckSlurmFence(const Environment& environment, const Launch& launch) {
  if (launch.launcher != Launcher::kSlurmPmix || !launch.several_hosts ||
      environment.Variable("SLURM_PMIX_FENCE") == "ring")
    return {};
  return {Warning("slurm-fence",
                  "Slurm may let some ranks go on before all have started, and then MPI_Init "
                  "crashes now and then: export SLURM_PMIX_FENCE=ring before srun")};
}

Findings CheckForeignLauncher(const Launch& launch) {
  if (launch.launcher != Launcher::kOtherPmi) return {};
  return {Error("foreign-launcher",
                absl::StrCat("started ", launch.ranks,
                             " times by the mpiexec of another MPI (MPICH, Intel MPI), so each "
                             "rank would run alone: use Open MPI's mpirun"))};
}

int Major(const std::string& version) {
  int major = 0;
  const std::vector<absl::string_view> parts = absl::StrSplit(version, '.');
  return absl::SimpleAtoi(parts[0], &major) ? major : 0;
}

Findings CheckMpiLibraries(const Environment& environment) {
  if (environment.mpi_libraries.size() > 1) {
    return {Error("two-mpi-libraries",
                  absl::StrCat("two MPI libraries are in this process, ",
                               absl::StrJoin(environment.mpi_libraries, " and "),
                               ": take all but one off LD_PRELOAD and LD_LIBRARY_PATH"))};
  }
  if (!environment.mpi_built.empty() &&
      Major(environment.mpi_loaded) < Major(environment.mpi_built)) {
    return {
        Error("two-mpi-libraries",
              absl::StrCat(
                  "built with Open MPI ", environment.mpi_built, " but running with ",
                  environment.mpi_loaded.empty() ? "another MPI" : environment.mpi_loaded,
                  environment.mpi_libraries.empty() ? "" : " from " + environment.mpi_libraries[0],
                  ": correct LD_LIBRARY_PATH, or build again with that one"))};
  }
  return {};
}

constexpr int64_t kMiB = int64_t{1} << 20;
std::string Mebibytes(int64_t bytes) { return absl::StrCat(bytes / kMiB, " MiB"); }

// Open MPI maps 4 MiB a rank there, and the windows of the TP groups take half of one. With less,
// MPI_Init fails or, because pages are taken when they are first touched, a rank dies of SIGBUS.
Findings CheckSharedMemory(const Environment& environment, const Launch& launch) {
  const int64_t needed = int64_t{launch.local_ranks} * 5 * kMiB;
  const bool elsewhere = environment.Has("OMPI_MCA_btl_vader_backing_directory") ||
                         environment.Has("OMPI_MCA_btl_sm_backing_directory");
  if (launch.local_ranks < 2 || environment.shm_free_bytes >= needed || elsewhere) return {};
  Finding finding = Error(
      "small-shm",
      environment.shm_free_bytes < 0
          ? absl::StrCat("host ", environment.host,
                         " has no /dev/shm that this process may write, and its ranks talk "
                         "through it: mount a tmpfs there")
          : absl::StrCat("/dev/shm of host ", environment.host, " has ",
                         Mebibytes(environment.shm_free_bytes), " free and ", launch.local_ranks,
                         " ranks need ", Mebibytes(needed),
                         ": start the container with --shm-size=1g, or mount -o remount,size=1g "
                         "/dev/shm"));
  finding.of_host = true;
  return {finding};
}

// Networks by name or address range, as Open MPI takes them.
bool MeansLoopback(absl::string_view network) {
  return network == "lo" || absl::StartsWith(network, "127.");
}

// What a user chose for the ranks of different hosts to talk over.
Findings CheckChosenNetwork(const Environment& environment, const Launch& launch) {
  Findings findings;
  if (!launch.several_hosts) return findings;
  for (const std::string name : {"OMPI_MCA_btl_tcp_if_include", "NCCL_SOCKET_IFNAME"}) {
    if (!environment.Has(name)) continue;
    const bool nccl = name[0] == 'N';
    std::string value = environment.Variable(name);
    if (nccl && absl::StartsWith(value, "^")) continue;  // what not to use
    if (nccl && absl::StartsWith(value, "=")) value.erase(0, 1);
    for (absl::string_view network : absl::StrSplit(value, ',', absl::SkipWhitespace())) {
      const std::string remedy = absl::StrCat(": set it to the network between the hosts, as ",
                                              nccl ? "eth0" : "10.0.0.0/8", ", or unset it");
      if (MeansLoopback(network)) {
        findings.push_back(Error("wrong-network", absl::StrCat(name, "=", value,
                                                               " is this host alone, and the job "
                                                               "has several",
                                                               remedy)));
      } else if (IsVirtualBridge(std::string(network))) {
        findings.push_back(Error("wrong-network", absl::StrCat(name, "=", value,
                                                               " is a bridge to this host's own "
                                                               "containers, and the job has "
                                                               "several hosts",
                                                               remedy)));
      }
    }
  }
  return findings;
}

// The oldest driver of each CUDA generation (CUDA Compatibility guide, "minor version
// compatibility").
struct DriverOfCuda {
  int major;
  const char* driver;
};
constexpr std::array<DriverOfCuda, 3> kDrivers = {
    {{11, "450.80.02"}, {12, "525.60.13"}, {13, "580.65.06"}}};

std::vector<int> Numbers(const std::string& version) {
  std::vector<int> numbers;
  for (absl::string_view part : absl::StrSplit(version, '.')) {
    int number = 0;
    if (!absl::SimpleAtoi(part, &number)) return {};
    numbers.push_back(number);
  }
  return numbers;
}

Findings CheckDriver(const Environment& environment) {
  if (environment.nvidia_driver.empty()) {
    return {Error("no-driver",
                  "no NVIDIA driver is loaded on this host: install it, start the container with "
                  "--gpus all, or use --device cpu")};
  }
  const int cuda = environment.cuda_runtime / 1000;
  for (const DriverOfCuda& row : kDrivers) {
    if (row.major != cuda) continue;
    const std::vector<int> have = Numbers(environment.nvidia_driver);
    // A forward-compatible libcuda stands in for a newer driver.
    const bool compat = absl::StrContains(environment.Variable("LD_LIBRARY_PATH"), "compat");
    if (have.empty() || compat || have >= Numbers(row.driver)) return {};
    return {Error("old-driver",
                  absl::StrCat("the NVIDIA driver ", environment.nvidia_driver,
                               " is older than CUDA ", cuda, " of this program takes: install ",
                               row.driver, " or newer, or the package cuda-compat-", cuda, "-",
                               environment.cuda_runtime % 1000 / 10))};
  }
  return {};
}

Findings CheckNccl(const Environment& environment) {
  const std::optional<NcclFault> fault = environment.nccl == 0
                                             ? NcclIsMissing(environment.nccl_error)
                                             : NcclDoesNotFit(environment.nccl);
  if (!fault) return {};
  return {Error(fault->name, fault->text)};
}

}  // namespace

std::string Finding::Line() const {
  std::string line = absl::StrCat(text, " (", name, ")");
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return line;
}

bool HasError(const Findings& findings) {
  return std::any_of(findings.begin(), findings.end(),
                     [](const Finding& f) { return f.severity == Severity::kError; });
}

int64_t JobPlan::ranks() const {
  // Three ints: 2^31 each would not fit, and nobody has more than 2^20 of anything.
  int64_t product = 1;
  for (const int64_t factor : {tp, pp, dp}) {
    product =
        std::min<int64_t>(int64_t{1} << 40, product * std::clamp<int64_t>(factor, 1, 1 << 20));
  }
  return product;
}

Findings CheckLaunch(const Environment& environment) {
  const Launch launch = IdentifyLaunch(environment);
  Findings findings;
  const auto add = [&findings](const Findings& more) {
    findings.insert(findings.end(), more.begin(), more.end());
  };
  add(CheckNumbers(environment));
  add(CheckComponents(environment));
  add(CheckRefusedVariables(environment));
  add(CheckSlurmStep(environment, launch));
  add(CheckSlurmFence(environment, launch));
  add(CheckForeignLauncher(launch));
  add(CheckMpiLibraries(environment));
  if (launch.launcher == Launcher::kAlone) add(CheckSessionFolder(environment));
  add(CheckSharedMemory(environment, launch));
  add(CheckChosenNetwork(environment, launch));
  return findings;
}

Findings CheckHost(const Environment& environment, const JobPlan& plan, int local_ranks, int ranks,
                   bool look_for_nccl) {
  Findings findings;
  if (plan.ahead) {
    ranks = static_cast<int>(std::clamp<int64_t>(plan.ranks(), ranks, 1 << 24));
    if (!plan.hostfile) local_ranks = ranks;
  }
  if (environment.infiniband && ranks > local_ranks && environment.locked_memory_bytes >= 0 &&
      environment.locked_memory_bytes < 1024 * kMiB) {
    findings.push_back(
        Warning("locked-memory",
                absl::StrCat("only ", Mebibytes(environment.locked_memory_bytes),
                             " of memory may be locked, and InfiniBand needs more: ulimit -l "
                             "unlimited (container: --ulimit memlock=-1; Slurm: "
                             "PropagateResourceLimitsExcept=MEMLOCK)")));
  }
  if (!plan.cuda) return findings;
  if (environment.cuda_runtime == 0) {
    findings.push_back(Error("no-cuda-backend",
                             "--device cuda: this build has no CUDA backend: build the preset cuda "
                             "(needs nvcc), or use --device cpu"));
    return findings;
  }
  for (const Finding& finding : CheckDriver(environment)) findings.push_back(finding);
  if (ranks > 1 && look_for_nccl) {
    for (const Finding& finding : CheckNccl(environment)) findings.push_back(finding);
  }
  return findings;
}

Findings CheckWorldSize(const Environment& environment, int ranks) {
  const Launch launch = IdentifyLaunch(environment);
  if (launch.ranks == 0 || launch.ranks == ranks) return {};
  return {Error(
      "singletons",
      absl::StrCat(launch.launcher == Launcher::kMpirun ? "mpirun" : "srun", " started ",
                   launch.ranks, " ranks but MPI sees ", ranks,
                   ", so its MPI is another than this program's (Open MPI ", environment.mpi_loaded,
                   environment.mpi_libraries.empty() ? "" : " from " + environment.mpi_libraries[0],
                   "): use the mpirun that belongs to it, or correct LD_LIBRARY_PATH"))};
}

Findings CheckRankCount(const JobPlan& plan, int ranks) {
  const int64_t wanted = plan.ranks();
  const bool complete = plan.tp > 0 && plan.pp > 0 && plan.dp > 0;
  if (wanted == 1 && !complete) return {};
  if (complete ? ranks == wanted : ranks % wanted == 0) return {};
  std::string flags;
  const std::array<std::pair<const char*, int>, 3> all = {
      {{"--tp ", plan.tp}, {"--pp ", plan.pp}, {"--dp ", plan.dp}}};
  for (const auto& [flag, value] : all) {
    if (value > 0) absl::StrAppend(&flags, flags.empty() ? "" : " ", flag, value);
  }
  return {Error(
      "rank-count",
      absl::StrCat(flags, ": ", complete || wanted > ranks ? "needs " : "needs a multiple of ",
                   wanted, " ranks and there ", ranks == 1 ? "is 1" : absl::StrCat("are ", ranks),
                   ": mpirun -n ", wanted, ", or other numbers"))};
}

}  // namespace trireme
