// What this process was started by and what it sees of its machine. CollectEnvironment reads it;
// everything that judges it (launch/doctor_checks.h, launch/placement.h) is a pure function over
// the struct, so that tests run on recorded environments (`trireme doctor --json` records one).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace trireme {

// An IPv4 address of an interface that is up.
struct NetworkInterface {
  std::string name;
  std::string address;  // "10.0.0.7"
  int prefix_bits = 32;
  bool operator==(const NetworkInterface&) const = default;
};

// An NVIDIA GPU of the machine; CUDA numbers equal GPUs by PCI address.
struct Gpu {
  std::string pci_address;  // "0000:1b:00.0"
  std::string uuid;         // "GPU-5f..."; empty when the driver does not tell
  int numa_node = -1;       // -1: the machine has one or does not say
  bool operator==(const Gpu&) const = default;
};

// Collected once, before MPI starts. A field that could not be read keeps its default.
struct Environment {
  // Of launchers, MPI, Slurm, CUDA, NCCL and containers; no others, and no secrets.
  std::map<std::string, std::string> variables;
  std::map<std::string, std::string> mpi_parameters;  // from Open MPI's files: btl_tcp_if_*
  std::string host;
  int64_t user_id = -1;
  int cores = 0;           // hardware threads that this process may run on
  bool container = false;  // Docker, Podman, Apptainer, ...
  // SLURM_TASK_PID is this process or one that it descends from: Slurm really started it.
  bool slurm_task_is_ours = false;
  std::string mpi_built;                   // "4.1.4": of the header this program was built with
  std::string mpi_loaded;                  // "4.1.4": of the library it runs with; empty: another
  std::vector<std::string> mpi_libraries;  // files of MPI libraries in this process
  // By variable (OMPI_MCA_btl, ...) the first component it asks for that this Open MPI has not. See
  // launch/mpi_components.h.
  std::map<std::string, std::string> absent_mpi_components;
  // OMPI_MCA_*, PMIX_MCA_* and PRTE_MCA_* variables with which MPI does not start, as found by a
  // trial: not by CollectEnvironment. See launch/mpi_trial.h.
  std::vector<std::string> refused_mpi_variables;
  // Where MPI and mpirun keep files of their own, and what is free there; -1: not writable.
  std::string session_folder;
  int64_t session_free_bytes = -1;
  int64_t shm_free_bytes = -1;       // of /dev/shm; -1: there is none
  int64_t locked_memory_bytes = -1;  // limit; -1: none
  bool infiniband = false;           // an InfiniBand or RoCE device is there
  std::vector<NetworkInterface> interfaces;
  std::vector<Gpu> gpus;
  std::string nvidia_driver;  // "550.54.15"; empty: not loaded
  int cuda_runtime = 0;       // that the CUDA backend was built with: 13000 is 13.0; 0: no backend
  // Looked for only with CollectOptions.programs.
  std::string mpirun, srun;    // on PATH; empty: not there
  std::string mpirun_version;  // what `mpirun --version` prints first; empty: nothing, or not asked
  int physical_cores = 0;      // whose threads those are; 0: /sys does not say
  int nccl = 0;                // version of the library found: 22809 is 2.28.9; 0: none
  std::string nccl_error;      // what the loader says when there is none
  bool operator==(const Environment&) const = default;

  // Empty when it is not set.
  const std::string& Variable(const std::string& name) const;
  bool Has(const std::string& name) const { return variables.count(name) != 0; }
  // The variable as a number from 0 to 2^24, or -1 when it is unset or anything else.
  int Number(const std::string& name) const;
};

enum class Launcher {
  kAlone,             // started by hand, or one task of a Slurm step: a job of one rank
  kMpirun,            // Open MPI's mpirun, 4 or 5
  kSlurmPmix,         // srun --mpi=pmix
  kPmix,              // another launcher that speaks PMIx
  kSlurmWithoutPmix,  // srun --mpi=pmi2 or none: Open MPI cannot join its tasks
  kOtherPmi,          // mpiexec of MPICH, Intel MPI or a Cray
};

// What the launcher says of this process; MPI itself has the last word (ControlPlane).
struct Launch {
  Launcher launcher = Launcher::kAlone;
  int rank = 0, local_rank = 0;
  int ranks = 1, local_ranks = 1;  // 0: it does not say
  bool several_hosts = false;
};
Launch IdentifyLaunch(const Environment& environment);
std::string Describe(const Launch& launch);  // "by mpirun, rank 1 of 4"

// Slurm's "2(x3),1" is 2, 2, 2, 1; empty when it is anything else.
std::vector<int> TasksPerNode(const std::string& text);

// The GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order: all when it is not set. Like CUDA,
// the list ends at the first entry that names no GPU.
std::vector<Gpu> VisibleGpus(const Environment& environment);

// Networks that exist within one host only: docker0, virbr0 and the like, by the names their makers
// give them.
bool IsVirtualBridge(const std::string& interface);

struct CollectOptions {
  // Look for mpirun, srun and NCCL too (3 ms), and ask an mpirun that may be wanted for its version
  // (30 ms).
  bool programs = false;
  std::string root;  // in front of /proc, /sys and /etc: a recorded tree
};
// Reads variables and files; no MPI call that needs MPI_Init. Below 1 ms. Call before threads
// start.
Environment CollectEnvironment(const CollectOptions& options);

// What this process's environment wants before MPI starts, where the user has not said otherwise:
// no bridge as the network between hosts (Open MPI takes a docker0 that two hosts have for their
// common network, and waits for ever), and no SLURM_STEP_ID in a step of one task without PMIx
// (Open MPI would refuse to run it). By name; "" = to be unset.
std::map<std::string, std::string> Preparations(const Environment& environment);
// Does it. Single-threaded, like setenv.
void PrepareEnvironment(const Environment& environment);

// Recording and reading back; keys are the fields' names. Parsing fails on other JSON with a line.
std::string EnvironmentToJson(const Environment& environment);
absl::StatusOr<Environment> EnvironmentFromJson(const std::string& json);

}  // namespace trireme
