#include "launch/mpi_trial.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <thread>

#include "absl/strings/match.h"
#include "launch/doctor_checks.h"
#include "launch/single_node.h"
#include "parallel/control_plane.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
using Names = std::vector<std::string>;

// mpirun ends its ranks when it is asked to end.
constexpr std::chrono::seconds kMpirunLeaves(2);

Names VariablesOnTrial(const Environment& environment) {
  Names names;
  for (const auto& [name, value] : environment.variables) {
    for (const char* prefix : {"OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_"}) {
      if (absl::StartsWith(name, prefix) && !IsSingleNodeSetting(name, value))
        names.push_back(name);
    }
  }
  return names;
}

[[noreturn]] void BecomeTrial(const Names& command, const Names& without) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  setpgid(0, 0);  // Ctrl-C is for the program
  const int nowhere = open("/dev/null", O_RDWR);
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) dup2(nowhere, stream);
  for (const std::string& name : without) unsetenv(name.c_str());
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  _exit(127);
}

// Whether the process has ended by then; its status.
bool EndsBy(Clock::time_point deadline, pid_t child, int* status) {
  while (waitpid(child, status, WNOHANG) != child) {
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

bool Succeeds(const Names& command, const Names& without, std::chrono::milliseconds limit) {
  const pid_t child = fork();
  if (child == 0) BecomeTrial(command, without);
  if (child < 0) return true;  // the real start tells
  int status = 0;
  if (EndsBy(Clock::now() + limit, child, &status))
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  kill(-child, SIGTERM);
  const bool ended = EndsBy(Clock::now() + kMpirunLeaves, child, &status);
  kill(-child, SIGKILL);
  if (!ended) waitpid(child, &status, 0);
  return false;
}

Names AllBut(const Names& names, const std::string& one) {
  Names others;
  for (const std::string& name : names) {
    if (name != one) others.push_back(name);
  }
  return others;
}

}  // namespace

int TrialMain() {
  PrepareEnvironment(CollectEnvironment({}));
  return ControlPlane::Start(nullptr, nullptr).ok() ? 0 : 1;
}

void TryMpiVariables(Environment* environment, bool mpirun) {
  if (HasError(CheckLaunch(*environment))) return;
  if (mpirun && !CheckMpirun(*environment, {}).empty()) return;
  std::error_code unknown;
  Names command = {std::filesystem::read_symlink("/proc/self/exe", unknown).string(), kMpiTrial};
  if (mpirun) command.insert(command.begin(), {"mpirun", "-n", "1"});
  environment->refused_mpi_variables = RefusedMpiVariables(*environment, command);
}

Names RefusedMpiVariables(const Environment& environment, const Names& command,
                          std::chrono::milliseconds limit) {
  const Names names = VariablesOnTrial(environment);
  if (names.empty() || Succeeds(command, {}, limit) || !Succeeds(command, names, limit)) return {};
  Names refused;
  for (const std::string& name : names) {
    if (!Succeeds(command, AllBut(names, name), limit)) refused.push_back(name);
  }
  if (!refused.empty()) return refused;
  // Only together; or the machine had stood still for a while.
  if (Succeeds(command, {}, limit)) return {};
  Names innocent;
  for (const std::string& name : names) {
    innocent.push_back(name);
    if (!Succeeds(command, innocent, limit)) continue;
    innocent.pop_back();
    refused.push_back(name);
  }
  return refused;
}

}  // namespace trireme
