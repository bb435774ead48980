// What can be wrong with a machine or with how a job was started, one function for each thing that
// is looked at. Pure functions over recorded environments; launch/doctor.h runs them, in `trireme
// doctor` and at the start of every command that runs a model. docs/operations.md explains each
// finding by its name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/environment.h"

namespace trireme {

enum class Severity { kWarning, kError };  // error: the job cannot work

struct Finding {
  Severity severity = Severity::kError;
  std::string name;      // "srun-without-pmix"
  std::string text;      // what is wrong: what to do
  bool of_host = false;  // of this host, maybe not of the others
  // "srun started 4 tasks ...: use srun --mpi=pmix (srun-without-pmix)": one line, printable.
  std::string Line() const;
  bool operator==(const Finding&) const = default;
};
using Findings = std::vector<Finding>;
bool HasError(const Findings& findings);

// What the user wants to run.
struct JobPlan {
  int tp = 0, pp = 0, dp = 0;  // 0: not given
  bool cuda = false;           // on GPUs
  bool shared_gpus = false;    // several ranks may use one
  bool hostfile = false;       // says where, so that this host's cores are not the limit
  bool ahead = false;          // nothing of it has been started yet
  int64_t ranks() const;       // that the flags ask for, at least
};

// Before MPI starts: what makes MPI_Init fail, hang, or split the job into several (errors), or
// may.
Findings CheckLaunch(const Environment& environment);

// Of a terminal, before anything is started: whether mpirun will be able to start the plan's ranks
// here.
Findings CheckMpirun(const Environment& environment, const JobPlan& plan);

// One host: its limits, driver, NCCL. `local_ranks` run on it, of `ranks` in all; of a plan that is
// ahead, all that it asks for. With `look_for_nccl` environment.nccl was looked for.
Findings CheckHost(const Environment& environment, const JobPlan& plan, int local_ranks, int ranks,
                   bool look_for_nccl);

// After MPI started with `ranks` ranks: as many as the launcher said.
Findings CheckWorldSize(const Environment& environment, int ranks);

// The product of the flags against the ranks there are; empty when they fit.
Findings CheckRankCount(const JobPlan& plan, int ranks);

// What one rank tells the others after MPI has started.
struct RankReport {
  std::string host;
  std::string program;                  // build id
  std::string mpi;                      // "4.1.4"
  std::vector<std::string> checkpoint;  // "name size hash" of its files; one rank of a host has it
  std::vector<std::string> networks;    // "10.0.0.0/24", without loopback and bridges
  std::vector<std::string> gpus;        // PCI addresses that it may use
};
std::string Serialize(const RankReport& report);
RankReport ParseRankReport(const std::string& bytes);
std::vector<std::string> NetworksOf(const Environment& environment);

// Across the job: reports by rank. What Slurm has dealt out to each task counts as its own.
Findings CheckJob(const std::vector<RankReport>& reports, const JobPlan& plan);

// Whether mpirun may start more ranks than it has slots.
bool MayOversubscribe(const Environment& environment);

// A hostfile as mpirun reads it ("host slots=N max_slots=M"), against the ranks that must have a
// slot. `known` says whether a host name has an address.
Findings CheckHostfile(const std::string& path, const std::string& text, int64_t ranks,
                       bool (*known)(const std::string& host));

}  // namespace trireme
