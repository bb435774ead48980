// A table of recorded environments, one at least for every finding, and healthy ones without.
#include "launch/doctor_checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/launch/recorded.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

// All that one process can find out, as `trireme doctor` asks it.
Findings CheckAll(const Environment& environment, const JobPlan& plan) {
  const Launch launch = IdentifyLaunch(environment);
  Findings findings = CheckLaunch(environment);
  const auto add = [&findings](const Findings& more) {
    findings.insert(findings.end(), more.begin(), more.end());
  };
  if (launch.launcher == Launcher::kAlone) {
    add(CheckMpirun(environment, plan));
  } else {
    add(CheckRankCount(plan, launch.ranks));
  }
  add(CheckHost(environment, plan, launch.local_ranks, launch.ranks, /*look_for_nccl=*/true));
  return findings;
}

struct FindingCase {
  std::string recorded, patch;
  JobPlan plan;
  std::vector<std::string> names;  // of what is found, in order
  std::string text;                // some of the first one's line
  bool error = true;
};

class FindingTest : public testing::TestWithParam<FindingCase> {};

TEST_P(FindingTest, FindsThat) {
  const FindingCase& expected = GetParam();
  const Findings findings = CheckAll(Recorded(expected.recorded, expected.patch), expected.plan);
  std::vector<std::string> names;
  for (const Finding& finding : findings) names.push_back(finding.name);
  EXPECT_EQ(names, expected.names) << (findings.empty() ? "" : findings[0].Line());
  EXPECT_THAT(findings.empty() ? "" : findings[0].Line(), HasSubstr(expected.text));
  EXPECT_EQ(HasError(findings), !findings.empty() && expected.error);
}

// A user of a machine with 4 cores.
constexpr char kUser[] = R"({"user_id": 1000, "cores": 8, "physical_cores": 4})";
constexpr char kRing[] = R"({"variables": {"SLURM_PMIX_FENCE": "ring"}})";
constexpr JobPlan kTwoByTwo{.tp = 2, .pp = 2};

INSTANTIATE_TEST_SUITE_P(
    Healthy, FindingTest,
    testing::Values(FindingCase{"alone", kUser, {}, {}, ""},
                    FindingCase{"alone", kUser, kTwoByTwo, {}, ""},
                    FindingCase{"alone", kUser, {.tp = 64, .hostfile = true}, {}, ""},
                    FindingCase{"alone",
                                R"({"user_id": 1000, "physical_cores": 4,
                                    "mpirun_version": "mpirun (Open MPI) 4.1.4\n\nReport bugs"})",
                                kTwoByTwo,
                                {},
                                ""},
                    FindingCase{"alone",
                                R"({"user_id": 1000, "physical_cores": 4,
                                    "mpirun_version": "prterun (PRRTE) 3.0.2\n"})",
                                kTwoByTwo,
                                {},
                                ""},
                    // A wrapper that prints something else first, and one that prints nothing.
                    FindingCase{"alone",
                                R"({"user_id": 1000, "physical_cores": 4,
                                    "mpirun_version": "Welcome\nmpirun (Open MPI) 5.0.7\n"})",
                                kTwoByTwo,
                                {},
                                ""},
                    FindingCase{"alone",
                                R"({"user_id": 1000, "physical_cores": 4,
                                    "mpirun_version": "mpirun (IBM Spectrum MPI) 10.4.0.6\n"})",
                                kTwoByTwo,
                                {},
                                ""},
                    FindingCase{"alone",
                                R"({"user_id": 1000, "physical_cores": 4, "mpirun_version": "\n"})",
                                kTwoByTwo,
                                {},
                                ""},
                    FindingCase{"openmpi4", "{}", {.tp = 2}, {}, ""},
                    FindingCase{"openmpi5", "{}", {.pp = 2}, {}, ""},
                    FindingCase{"batch_script", "{}", {}, {}, ""},
                    FindingCase{"batch_script", "{}", kTwoByTwo, {}, ""},
                    FindingCase{"openmpi4_in_sbatch", "{}", kTwoByTwo, {}, ""},
                    FindingCase{"srun_pmix", kRing, kTwoByTwo, {}, ""},
                    FindingCase{"srun_pmix", kRing, {.tp = 2}, {}, ""},
                    // As root with permission, with more ranks than cores and leave to.
                    FindingCase{"alone",
                                R"({"variables": {"OMPI_ALLOW_RUN_AS_ROOT": "1",
                                                  "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                                                  "OMPI_MCA_rmaps_base_oversubscribe": "true"}})",
                                kTwoByTwo,
                                {},
                                ""}));

INSTANTIATE_TEST_SUITE_P(
    Launch, FindingTest,
    testing::Values(
        FindingCase{"srun_pmi2", "{}", {}, {"srun-without-pmix"}, "2 tasks with --mpi=pmi2"},
        FindingCase{"srun_none", "{}", {}, {"srun-without-pmix"}, "use srun --mpi=pmix"},
        FindingCase{"srun_none",
                    R"({"slurm_task_is_ours": false, "container": true})",
                    {},
                    {"stale-slurm"},
                    "a container that inherited them"},
        FindingCase{"batch_script",
                    R"({"srun": "", "container": true})",
                    kTwoByTwo,
                    {"stale-slurm"},
                    "no srun on PATH (a container inherited them)"},
        FindingCase{"batch_script",
                    R"({"slurm_task_is_ours": false})",
                    {},
                    {"stale-slurm"},
                    "Slurm did not start this process",
                    false},
        FindingCase{"srun_pmix", "{}", {}, {"slurm-fence"}, "SLURM_PMIX_FENCE=ring", false},
        FindingCase{"mpich_hydra", "{}", {}, {"foreign-launcher"}, "use Open MPI's mpirun"},
        FindingCase{"openmpi4",
                    R"({"variables": {"OMPI_COMM_WORLD_SIZE": "banana"}})",
                    {},
                    {"garbage-variable"},
                    "OMPI_COMM_WORLD_SIZE is \"banana\""},
        FindingCase{"openmpi4",
                    R"({"absent_mpi_components": {"OMPI_MCA_btl": "ban\u0001na"}})",
                    {},
                    {"garbage-variable"},
                    "OMPI_MCA_btl names \"ban\\x01na\", which this Open MPI does not have"},
        FindingCase{"openmpi4",
                    R"({"absent_mpi_components": {"OPAL_PREFIX": "/nowhere"}})",
                    {},
                    {"garbage-variable"},
                    "OPAL_PREFIX names \"/nowhere\", which does not exist: unset OPAL_PREFIX"},
        FindingCase{"openmpi4",
                    R"({"variables": {"OMPI_MCA_plm_rsh_agent": "ban\u0001na"},
                        "refused_mpi_variables": ["OMPI_MCA_plm_rsh_agent"]})",
                    {},
                    {"garbage-variable"},
                    "MPI does not start with OMPI_MCA_plm_rsh_agent=\"ban\\x01na\": unset OMPI"},
        FindingCase{"alone",
                    R"({"user_id": 1000, "session_folder": "/proc", "session_free_bytes": -1})",
                    {},
                    {"session-folder"},
                    "in /proc, which is no folder that this process may write: set TMPDIR"},
        FindingCase{"alone",
                    R"({"user_id": 1000, "session_folder": "/tmp", "session_free_bytes": 4096})",
                    {},
                    {"session-folder"},
                    "in /tmp, which is full"},
        FindingCase{"srun_pmix",
                    R"({"variables": {"SLURM_PMIX_FENCE": "ring", "SLURM_PROCID": "-3"}})",
                    {},
                    {"garbage-variable"},
                    "unset SLURM_PROCID"},
        FindingCase{"openmpi4",
                    R"({"mpi_libraries": ["/opt/openmpi/lib/libmpi.so.40",
                                          "/usr/lib/x86_64-linux-gnu/libmpich.so.12"]})",
                    {},
                    {"two-mpi-libraries"},
                    "/opt/openmpi/lib/libmpi.so.40 and /usr/lib/x86_64-linux-gnu/libmpich.so.12"},
        FindingCase{"openmpi4",
                    R"({"mpi_built": "5.0.7"})",
                    {},
                    {"two-mpi-libraries"},
                    "built with Open MPI 5.0.7 but running with 4.1.4"},
        FindingCase{"openmpi4", R"({"mpi_loaded": ""})", {}, {"two-mpi-libraries"}, "another MPI"},
        FindingCase{"alone", kUser, {.tp = 8}, {"slots"}, "4 slots here and 8 ranks are wanted"},
        FindingCase{"batch_script", "{}", {.tp = 8}, {"slots"}, "4 slots here and 8"},
        FindingCase{"alone",
                    R"({"physical_cores": 4})",
                    kTwoByTwo,
                    {"root"},
                    "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"},
        FindingCase{"alone", "{}", {}, {"root"}, "refuses to run as root", false},
        FindingCase{"alone",
                    R"({"user_id": 1000, "mpirun": ""})",
                    kTwoByTwo,
                    {"no-mpirun"},
                    "install openmpi-bin"},
        FindingCase{"alone",
                    R"({"mpirun": "/opt/mpich/bin/mpirun",
                        "mpirun_version": "HYDRA build details:\n    Version: 4.0.2\n"})",
                    kTwoByTwo,
                    {"foreign-mpirun"},
                    "/opt/mpich/bin/mpirun is not Open MPI's mpirun (it says \"HYDRA build "
                    "details:\"), so each rank would run alone: install openmpi-bin"},
        FindingCase{
            "alone",
            R"({"mpirun_version": "\nIntel(R) MPI Library for Linux* OS, Version 2021.9\u0001\n"})",
            {},
            {"foreign-mpirun"},
            "(it says \"Intel(R) MPI Library for Linux* OS, Version 2021.9\\x01\")",
            false},
        // Of another MPI that the program itself runs with there is a line already.
        FindingCase{"alone",
                    R"({"user_id": 1000, "mpi_loaded": "", "mpirun_version": "HYDRA"})",
                    {},
                    {"two-mpi-libraries"},
                    "another MPI"},
        FindingCase{"openmpi4",
                    "{}",
                    kTwoByTwo,
                    {"rank-count"},
                    "--tp 2 --pp 2: needs 4 ranks and there are 2: mpirun -n 4"},
        FindingCase{"srun_pmix", kRing, {.tp = 3}, {"rank-count"}, "needs a multiple of 3 ranks"},
        FindingCase{
            "srun_pmix", kRing, {.tp = 2, .pp = 1, .dp = 1}, {"rank-count"}, "needs 2 ranks"}));

INSTANTIATE_TEST_SUITE_P(
    Network, FindingTest,
    testing::Values(
        FindingCase{
            "srun_pmix",
            R"({"variables": {"SLURM_PMIX_FENCE": "ring", "OMPI_MCA_btl_tcp_if_include": "lo"}})",
            {},
            {"wrong-network"},
            "OMPI_MCA_btl_tcp_if_include=lo is this host alone"},
        FindingCase{"openmpi4_in_sbatch",
                    R"({"variables": {"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8,127.0.0.0/8"}})",
                    {},
                    {"wrong-network"},
                    "this host alone"},
        FindingCase{
            "srun_pmix",
            R"({"variables": {"SLURM_PMIX_FENCE": "ring", "NCCL_SOCKET_IFNAME": "=docker0"}})",
            {},
            {"wrong-network"},
            "a bridge to this host's own containers"},
        // Without several hosts loopback is a network like any; "^" names what not to use.
        FindingCase{
            "openmpi4", R"({"variables": {"OMPI_MCA_btl_tcp_if_include": "lo"}})", {}, {}, ""},
        FindingCase{
            "srun_pmix",
            R"({"variables": {"SLURM_PMIX_FENCE": "ring", "NCCL_SOCKET_IFNAME": "^lo,docker"}})",
            {},
            {},
            ""}));

INSTANTIATE_TEST_SUITE_P(
    Limits, FindingTest,
    testing::Values(
        FindingCase{"openmpi4",
                    R"({"shm_free_bytes": 8388608})",
                    {},
                    {"small-shm"},
                    "has 8 MiB free and 2 ranks need 10 MiB: start the container with --shm-size"},
        FindingCase{"openmpi4", R"({"shm_free_bytes": -1})", {}, {"small-shm"}, "no /dev/shm"},
        FindingCase{"openmpi4",
                    R"({"shm_free_bytes": 0,
                        "variables": {"OMPI_MCA_btl_vader_backing_directory": "/tmp"}})",
                    {},
                    {},
                    ""},
        FindingCase{"alone", R"({"user_id": 7, "shm_free_bytes": 0})", {}, {}, ""},
        FindingCase{"srun_pmix",
                    R"({"infiniband": true, "locked_memory_bytes": 65536,
                        "variables": {"SLURM_PMIX_FENCE": "ring"}})",
                    {},
                    {"locked-memory"},
                    "ulimit -l",
                    false},
        // Nobody registers memory on one host, or without InfiniBand.
        FindingCase{
            "openmpi4", R"({"infiniband": true, "locked_memory_bytes": 65536})", {}, {}, ""},
        FindingCase{"srun_pmix",
                    R"({"locked_memory_bytes": 65536,
                        "variables": {"SLURM_PMIX_FENCE": "ring"}})",
                    {},
                    {},
                    ""}));

constexpr JobPlan kCuda{.cuda = true};
INSTANTIATE_TEST_SUITE_P(
    Gpus, FindingTest,
    testing::Values(
        FindingCase{"openmpi4", "{}", kCuda, {"no-cuda-backend"}, "build the preset cuda"},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 13000})",
                    kCuda,
                    {"no-driver"},
                    "no NVIDIA driver is loaded"},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 13000, "nvidia_driver": "550.54.15"})",
                    kCuda,
                    {"old-driver"},
                    "install 580.65.06 or newer, or the package cuda-compat-13-0"},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 13000, "nvidia_driver": "550.54.15",
                        "variables": {"LD_LIBRARY_PATH": "/usr/local/cuda-13.0/compat"}})",
                    kCuda,
                    {},
                    ""},
        FindingCase{
            "openmpi4", R"({"cuda_runtime": 13000, "nvidia_driver": "580.65.06"})", kCuda, {}, ""},
        FindingCase{
            "openmpi4", R"({"cuda_runtime": 12040, "nvidia_driver": "1000.1"})", kCuda, {}, ""},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 12040, "nvidia_driver": "550.54.15", "nccl": 0,
                        "nccl_error": "libnccl.so.2: no such file"})",
                    kCuda,
                    {"no-nccl"},
                    "NCCL is missing (libnccl.so.2: no such file), and ranks on GPUs talk through "
                    "it: install libnccl2"},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 12040, "nvidia_driver": "550.54.15", "nccl": 30102})",
                    kCuda,
                    {"other-nccl"},
                    "NCCL 3.1 is found, and this program needs 2.x: install libnccl2"},
        FindingCase{"openmpi4",
                    R"({"cuda_runtime": 12040, "nvidia_driver": "550.54.15", "nccl": 2804})",
                    kCuda,
                    {},
                    ""},
        // By the ranks that are to be started, where nothing has been yet.
        FindingCase{"alone",
                    R"({"user_id": 1000, "physical_cores": 4, "cuda_runtime": 12040,
                        "nvidia_driver": "550.54.15", "nccl": 0, "nccl_error": "no such file"})",
                    {.tp = 2, .cuda = true, .ahead = true},
                    {"no-nccl"},
                    "NCCL is missing (no such file)"},
        FindingCase{"alone",
                    R"({"user_id": 1000, "physical_cores": 4, "cuda_runtime": 12040,
                        "nvidia_driver": "550.54.15", "nccl": 0, "nccl_error": "no such file"})",
                    {.tp = 1, .cuda = true, .ahead = true},
                    {},
                    ""}));

TEST(CheckWorldSize, OfAnotherMpiRun) {
  EXPECT_THAT(CheckWorldSize(Recorded("openmpi4"), 2), IsEmpty());
  EXPECT_THAT(CheckWorldSize(Recorded("alone"), 1), IsEmpty());
  const Findings findings = CheckWorldSize(Recorded("openmpi5"), 1);
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].name, "singletons");
  EXPECT_THAT(findings[0].Line(), HasSubstr("started 2 ranks but MPI sees 1"));
}

TEST(JobPlan, ManyRanksDoNotOverflow) {
  constexpr int kMost = 2147483647;
  EXPECT_EQ((JobPlan{.tp = 2, .pp = 3}).ranks(), 6);
  EXPECT_GT((JobPlan{.tp = kMost, .pp = kMost, .dp = kMost}).ranks(), int64_t{1} << 30);
  EXPECT_EQ(CheckRankCount({.tp = kMost, .pp = kMost, .dp = kMost}, 4).size(), 1u);
}

// Variables set to anything: a line or nothing, never a crash, and never more than a line.
TEST(Findings, SurviveNonsense) {
  const std::vector<std::string> names = {
      "alone",     "openmpi4",  "openmpi5",  "batch_script",  "openmpi4_in_sbatch",
      "srun_pmix", "srun_pmi2", "srun_none", "srun_one_task", "mpich_hydra"};
  const std::vector<std::string> values = {"",
                                           "-1",
                                           "0",
                                           "99999999999999999999",
                                           "2(x",
                                           "2(x9999999)",
                                           ",,,",
                                           "=",
                                           "^",
                                           "\x01\n\xff",
                                           "GPU-",
                                           "127.",
                                           std::string(5000, 'x'),
                                           "%s%n",
                                           "1(x1048576),1(x1048576)"};
  uint64_t draw = 0;
  const auto pick = [&draw](size_t n) {
    return static_cast<size_t>((RandomValue(7, draw++) + 1.0) / 2.0 * static_cast<double>(n)) % n;
  };
  for (int round = 0; round < 2000; ++round) {
    Environment environment = Recorded(names[pick(names.size())]);
    for (const char* more : {"OMPI_MCA_btl_tcp_if_include", "NCCL_SOCKET_IFNAME",
                             "CUDA_VISIBLE_DEVICES", "SLURM_TASKS_PER_NODE"})
      environment.variables[more] = "";
    for (auto& [name, value] : environment.variables) {
      if (pick(3) == 0) value = values[pick(values.size())];
    }
    environment.nvidia_driver = values[pick(values.size())];
    environment.mpirun_version = values[pick(values.size())];
    environment.cuda_runtime = 12040;
    for (const Finding& finding : CheckAll(environment, {.tp = 2, .cuda = true})) {
      const std::string line = finding.Line();
      EXPECT_LT(line.size(), 12000u);
      EXPECT_TRUE(std::all_of(line.begin(), line.end(), [](unsigned char c) { return c >= ' '; }));
    }
    VisibleGpus(environment);
    Preparations(environment);
    Describe(IdentifyLaunch(environment));
  }
}

}  // namespace
}  // namespace trireme
