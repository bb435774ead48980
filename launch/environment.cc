#include "launch/environment.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace trireme {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(NetworkInterface, name, address, prefix_bits)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Gpu, pci_address, uuid, numa_node)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Environment, variables, mpi_parameters, host,
                                                user_id, cores, container, slurm_task_is_ours,
                                                mpi_built, mpi_loaded, mpi_libraries,
                                                absent_mpi_components, refused_mpi_variables,
                                                session_folder, session_free_bytes, shm_free_bytes,
                                                locked_memory_bytes, infiniband, interfaces, gpus,
                                                nvidia_driver, cuda_runtime, mpirun, srun,
                                                mpirun_version, physical_cores, nccl, nccl_error)

const std::string& Environment::Variable(const std::string& name) const {
  static const std::string empty;
  const auto it = variables.find(name);
  return it == variables.end() ? empty : it->second;
}

int Environment::Number(const std::string& name) const {
  int value = -1;
  const bool read = absl::SimpleAtoi(Variable(name), &value);
  return read && value >= 0 && value <= 1 << 24 ? value : -1;
}

namespace {

Launch OfMpirun(const Environment& environment) {
  Launch launch{.launcher = Launcher::kMpirun};
  launch.rank = std::max(0, environment.Number("OMPI_COMM_WORLD_RANK"));
  launch.local_rank = std::max(0, environment.Number("OMPI_COMM_WORLD_LOCAL_RANK"));
  launch.ranks = std::max(0, environment.Number("OMPI_COMM_WORLD_SIZE"));
  launch.local_ranks = std::max(0, environment.Number("OMPI_COMM_WORLD_LOCAL_SIZE"));
  launch.several_hosts = launch.local_ranks > 0 && launch.ranks > launch.local_ranks;
  return launch;
}

Launch OfSlurm(const Environment& environment, Launcher launcher) {
  Launch launch{.launcher = launcher};
  launch.rank = std::max(0, environment.Number("SLURM_PROCID"));
  launch.local_rank = std::max(0, environment.Number("SLURM_LOCALID"));
  launch.ranks = std::max(0, environment.Number("SLURM_STEP_NUM_TASKS"));
  launch.several_hosts = environment.Number("SLURM_STEP_NUM_NODES") > 1;
  const std::vector<int> tasks = TasksPerNode(environment.Variable("SLURM_STEP_TASKS_PER_NODE"));
  const int node = environment.Number("SLURM_NODEID");
  launch.local_ranks = node >= 0 && node < static_cast<int>(tasks.size()) ? tasks[node] : 0;
  return launch;
}

}  // namespace

// SLURM_* come last: under mpirun inside a Slurm job they are those of mpirun's own daemon.
Launch IdentifyLaunch(const Environment& environment) {
  if (environment.Has("OMPI_COMM_WORLD_SIZE")) return OfMpirun(environment);
  // A batch script has no step: what it starts without srun or mpirun is on its own.
  const bool step = environment.Has("SLURM_STEP_ID") || environment.Has("SLURM_STEPID");
  if (environment.Has("PMIX_RANK") && environment.Has("PMIX_NAMESPACE")) {
    if (step) return OfSlurm(environment, Launcher::kSlurmPmix);
    return {.launcher = Launcher::kPmix,
            .rank = std::max(0, environment.Number("PMIX_RANK")),
            .local_rank = std::max(0, environment.Number("PMIX_RANK")),
            .ranks = 0,
            .local_ranks = 0};
  }
  if (step) {
    const Launch launch = OfSlurm(environment, Launcher::kSlurmWithoutPmix);
    return launch.ranks > 1 ? launch : Launch{};
  }
  if (environment.Has("PMI_FD") || environment.Has("PMI_RANK") || environment.Has("PMI_PORT")) {
    Launch launch{.launcher = Launcher::kOtherPmi};
    launch.rank = launch.local_rank = std::max(0, environment.Number("PMI_RANK"));
    launch.ranks = std::max(0, environment.Number("PMI_SIZE"));
    launch.local_ranks = 0;
    return launch.ranks > 1 ? launch : Launch{};
  }
  return {};
}

std::string Describe(const Launch& launch) {
  const auto of = [&launch](const char* name) {
    return launch.ranks > 0 ? absl::StrCat(name, ", rank ", launch.rank, " of ", launch.ranks)
                            : absl::StrCat(name, ", rank ", launch.rank);
  };
  switch (launch.launcher) {
    case Launcher::kAlone:
      return "alone";
    case Launcher::kMpirun:
      return of("by mpirun");
    case Launcher::kSlurmPmix:
      return of("by srun with PMIx");
    case Launcher::kPmix:
      return of("by a PMIx launcher");
    case Launcher::kSlurmWithoutPmix:
      return of("by srun without PMIx");
    case Launcher::kOtherPmi:
      return of("by mpiexec of another MPI");
  }
  return "";
}

std::vector<int> TasksPerNode(const std::string& text) {
  constexpr size_t kMostNodes = 1 << 20;
  std::vector<int> tasks;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> pieces = absl::StrSplit(part, absl::ByAnyChar("(x)"));
    int count = 0;
    size_t times = 1;
    if (!absl::SimpleAtoi(pieces[0], &count) || count < 0) return {};
    // "2", "(", "x", "3", ")"
    if (pieces.size() > 1 && (pieces.size() != 4 || !absl::SimpleAtoi(pieces[2], &times)))
      return {};
    if (times > kMostNodes - tasks.size()) return {};
    tasks.insert(tasks.end(), times, count);
  }
  return tasks;
}

std::vector<Gpu> VisibleGpus(const Environment& environment) {
  if (!environment.Has("CUDA_VISIBLE_DEVICES")) return environment.gpus;
  std::vector<Gpu> visible;
  for (absl::string_view entry :
       absl::StrSplit(environment.Variable("CUDA_VISIBLE_DEVICES"), ',')) {
    uint32_t index = 0;
    const Gpu* found = nullptr;
    if (absl::SimpleAtoi(entry, &index)) {
      if (index < environment.gpus.size()) found = &environment.gpus[index];
    } else {
      for (const Gpu& gpu : environment.gpus) {
        if (entry.size() > 4 && absl::StartsWith(gpu.uuid, entry)) found = &gpu;
      }
    }
    if (found == nullptr) break;
    visible.push_back(*found);
  }
  return visible;
}

bool IsVirtualBridge(const std::string& interface) {
  for (const char* prefix : {"docker", "virbr", "podman", "cni-podman", "lxcbr", "lxdbr"}) {
    if (absl::StartsWith(interface, prefix)) return true;
  }
  // Docker's own networks: "br-" and twelve hexadecimal digits.
  return interface.size() == 15 && absl::StartsWith(interface, "br-") &&
         interface.find_first_not_of("0123456789abcdef", 3) == std::string::npos;
}

std::map<std::string, std::string> Preparations(const Environment& environment) {
  std::map<std::string, std::string> prepared;
  const Launch launch = IdentifyLaunch(environment);
  if (launch.launcher == Launcher::kAlone && environment.Has("SLURM_STEP_ID"))
    prepared["SLURM_STEP_ID"] = "";
  // All processes that are alone share a folder in Open MPI 4: one that ends may remove what
  // another is about to use, and they need none.
  if (launch.launcher == Launcher::kAlone && !environment.Has("OMPI_MCA_orte_create_session_dirs"))
    prepared["OMPI_MCA_orte_create_session_dirs"] = "0";
  std::string bridges;
  bool others = false;
  for (const NetworkInterface& interface : environment.interfaces) {
    if (IsVirtualBridge(interface.name)) {
      absl::StrAppend(&bridges, ",", interface.name);
    } else if (!absl::StartsWith(interface.address, "127.")) {
      others = true;
    }
  }
  const bool chosen = environment.Has("OMPI_MCA_btl_tcp_if_include") ||
                      environment.Has("OMPI_MCA_btl_tcp_if_exclude") ||
                      environment.mpi_parameters.count("btl_tcp_if_include") != 0 ||
                      environment.mpi_parameters.count("btl_tcp_if_exclude") != 0;
  // The first two are what Open MPI excludes by itself.
  if (launch.launcher != Launcher::kAlone && !bridges.empty() && others && !chosen)
    prepared["OMPI_MCA_btl_tcp_if_exclude"] = "127.0.0.1/8,sppp" + bridges;
  return prepared;
}

std::string EnvironmentToJson(const Environment& environment) {
  return nlohmann::json(environment).dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<Environment> EnvironmentFromJson(const std::string& json) {
  try {
    return nlohmann::json::parse(json).get<Environment>();
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a recorded environment: ", std::string(error.what())));
  }
}

}  // namespace trireme
