#include "launch/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "tests/launch/recorded.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;

struct LaunchCase {
  std::string recorded, patch;
  Launcher launcher;
  int rank, local_rank, ranks, local_ranks;
  bool several_hosts;
};

class IdentifyLaunchTest : public testing::TestWithParam<LaunchCase> {};

TEST_P(IdentifyLaunchTest, SaysWhatTheLauncherSays) {
  const LaunchCase& expected = GetParam();
  const Launch launch = IdentifyLaunch(Recorded(expected.recorded, expected.patch));
  EXPECT_EQ(launch.launcher, expected.launcher) << Describe(launch);
  EXPECT_EQ(launch.rank, expected.rank);
  EXPECT_EQ(launch.local_rank, expected.local_rank);
  EXPECT_EQ(launch.ranks, expected.ranks);
  EXPECT_EQ(launch.local_ranks, expected.local_ranks);
  EXPECT_EQ(launch.several_hosts, expected.several_hosts);
}

constexpr char kNone[] = "{}";
INSTANTIATE_TEST_SUITE_P(
    Recorded, IdentifyLaunchTest,
    testing::Values(
        LaunchCase{"alone", kNone, Launcher::kAlone, 0, 0, 1, 1, false},
        LaunchCase{"openmpi4", kNone, Launcher::kMpirun, 0, 0, 2, 2, false},
        LaunchCase{"openmpi5", kNone, Launcher::kMpirun, 1, 1, 2, 2, false},
        // A batch script itself has SLURM_NTASKS=4 and is one process.
        LaunchCase{"batch_script", kNone, Launcher::kAlone, 0, 0, 1, 1, false},
        // mpirun's daemons are a Slurm step of two tasks; the job's ranks are four.
        LaunchCase{"openmpi4_in_sbatch", kNone, Launcher::kMpirun, 0, 0, 4, 2, true},
        LaunchCase{"openmpi4_in_sbatch",
                   R"({"variables": {"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "1"}})",
                   Launcher::kMpirun, 3, 0, 4, 2, true},
        LaunchCase{"srun_pmix", kNone, Launcher::kSlurmPmix, 0, 0, 4, 2, true},
        LaunchCase{"srun_pmi2", kNone, Launcher::kSlurmWithoutPmix, 0, 0, 2, 2, false},
        LaunchCase{"srun_none", kNone, Launcher::kSlurmWithoutPmix, 0, 0, 2, 2, false},
        LaunchCase{"srun_one_task", kNone, Launcher::kAlone, 0, 0, 1, 1, false},
        LaunchCase{"mpich_hydra", kNone, Launcher::kOtherPmi, 0, 0, 2, 0, false},
        LaunchCase{"mpich_hydra", R"({"variables": {"PMI_SIZE": "1"}})", Launcher::kAlone, 0, 0, 1,
                   1, false},
        LaunchCase{"alone", R"({"variables": {"PMIX_RANK": "3", "PMIX_NAMESPACE": "flux"}})",
                   Launcher::kPmix, 3, 3, 0, 0, false}));

TEST(Environment, NumbersAreNumbersOrNothing) {
  Environment environment;
  for (const auto& [text, number] : {std::pair{"7", 7},
                                     {"0", 0},
                                     {"-1", -1},
                                     {"", -1},
                                     {"x", -1},
                                     {"7x", -1},
                                     {"1e3", -1},
                                     {"99999999999999999999", -1},
                                     {"16777217", -1},
                                     {"\xff\n", -1}}) {
    environment.variables["X"] = text;
    EXPECT_EQ(environment.Number("X"), number) << text;
  }
  EXPECT_EQ(environment.Number("Y"), -1);
}

TEST(Environment, TasksPerNode) {
  EXPECT_THAT(TasksPerNode("2(x3),1"), ElementsAre(2, 2, 2, 1));
  EXPECT_THAT(TasksPerNode("4"), ElementsAre(4));
  EXPECT_THAT(TasksPerNode("3,1"), ElementsAre(3, 1));
  for (const char* bad :
       {"", "x", "2(", "2(x", "2(xx)", "2(x99999999999)", "2(x2000000)", "-1", ","})
    EXPECT_THAT(TasksPerNode(bad), IsEmpty()) << bad;
}

TEST(Environment, BridgesByName) {
  for (const char* name : {"docker0", "virbr0", "br-0123456789ab", "podman1", "lxdbr0"})
    EXPECT_TRUE(IsVirtualBridge(name)) << name;
  for (const char* name : {"lo", "eth0", "ib0", "br-lan", "br0", "bond0", "br-0123456789AG", ""})
    EXPECT_FALSE(IsVirtualBridge(name)) << name;
}

constexpr char kTwoGpus[] = R"({"gpus": [
    {"pci_address": "0000:1b:00.0", "uuid": "GPU-11aa", "numa_node": 0},
    {"pci_address": "0000:43:00.0", "uuid": "GPU-22bb", "numa_node": 1}]})";

TEST(Environment, VisibleGpusEndAtTheFirstThatIsNone) {
  Environment environment = Recorded("alone", kTwoGpus);
  const auto visible = [&](const char* value) {
    environment.variables["CUDA_VISIBLE_DEVICES"] = value;
    std::string all;
    for (const Gpu& gpu : VisibleGpus(environment)) all += gpu.pci_address.substr(5, 2) + " ";
    return all;
  };
  EXPECT_EQ(VisibleGpus(environment).size(), 2u);
  EXPECT_EQ(visible("1,0"), "43 1b ");
  EXPECT_EQ(visible("GPU-22,0"), "43 1b ");
  EXPECT_EQ(visible("0,-1,1"), "1b ");
  EXPECT_EQ(visible("7,0"), "");
  EXPECT_EQ(visible(""), "");
  EXPECT_EQ(visible("NoDevFiles"), "");
  EXPECT_EQ(visible("GPU-"), "");
}

// Two hosts that both have a docker0 of 172.17.0.1: Open MPI 4.1.4 connects to itself there and
// waits for ever (tests/launch/two_hosts_test.sh runs it).
TEST(Environment, KeepsOpenMpiOffBridges) {
  const std::string bridge =
      R"({"interfaces": [{"name": "lo", "address": "127.0.0.1", "prefix_bits": 8},
                         {"name": "docker0", "address": "172.17.0.1", "prefix_bits": 16},
                         {"name": "eth0", "address": "10.0.0.7", "prefix_bits": 24}])";
  EXPECT_THAT(Preparations(Recorded("openmpi4", bridge + "}")),
              ElementsAre(Pair("OMPI_MCA_btl_tcp_if_exclude", "127.0.0.1/8,sppp,docker0")));
  // Not against what the user said, in either place; not when nothing else is there; not alone.
  for (const char* more : {R"(, "variables": {"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8"}})",
                           R"(, "mpi_parameters": {"btl_tcp_if_include": "10.0.0.0/8"}})",
                           R"(, "mpi_parameters": {"btl_tcp_if_exclude": "eth9"}})"}) {
    EXPECT_THAT(Preparations(Recorded("openmpi4", bridge + more)), IsEmpty()) << more;
  }
  EXPECT_THAT(Preparations(Recorded("openmpi4", R"({"interfaces": [
                  {"name": "docker0", "address": "172.17.0.1", "prefix_bits": 16}]})")),
              IsEmpty());
  EXPECT_THAT(Preparations(Recorded("alone", bridge + "}")),
              ElementsAre(Pair("OMPI_MCA_orte_create_session_dirs", "0")));
}

// They would remove each other's folders.
TEST(Environment, ProcessesThatAreAloneShareNoFolder) {
  EXPECT_THAT(Preparations(Recorded("alone")),
              ElementsAre(Pair("OMPI_MCA_orte_create_session_dirs", "0")));
  EXPECT_THAT(Preparations(Recorded(
                  "alone", R"({"variables": {"OMPI_MCA_orte_create_session_dirs": "1"}})")),
              IsEmpty());
}

// Open MPI refuses to run in a Slurm step without PMIx, be it a step of one task.
TEST(Environment, OneTaskOfAStepRunsOnItsOwn) {
  EXPECT_THAT(Preparations(Recorded("srun_one_task")), Contains(Pair("SLURM_STEP_ID", "")));
  EXPECT_THAT(Preparations(Recorded("srun_pmix")), IsEmpty());
}

TEST(Environment, RecordingAndReadingBack) {
  const Environment environment = Recorded("srun_pmix", kTwoGpus);
  const absl::StatusOr<Environment> again = EnvironmentFromJson(EnvironmentToJson(environment));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(*again, environment);
  EXPECT_FALSE(EnvironmentFromJson("{").ok());
  EXPECT_FALSE(EnvironmentFromJson(R"({"cores": "many"})").ok());
  // Bytes that are no UTF-8 are written all the same.
  Environment odd;
  odd.variables["OMPI_X"] = "\xff\xfe";
  EXPECT_TRUE(EnvironmentFromJson(EnvironmentToJson(odd)).ok());
}

// A tree as the kernel and the driver show it.
void WriteTree(const std::string& root) {
  const auto write = [&root](const std::string& file, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root + file).parent_path());
    std::ofstream(root + file) << text;
  };
  write("/proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n");
  write("/proc/driver/nvidia/gpus/0000:43:00.0/information",
        "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 95\nGPU UUID: \t GPU-22bb\n");
  write("/proc/driver/nvidia/gpus/0000:1b:00.0/information", "GPU UUID: \t GPU-11aa\n");
  write("/sys/bus/pci/devices/0000:43:00.0/numa_node", "1\n");
  write("/sys/bus/pci/devices/0000:1b:00.0/numa_node", "0\n");
  write("/sys/class/infiniband/mlx5_0/node_guid", "0\n");
  write("/etc/openmpi/openmpi-mca-params.conf",
        "# a comment\nbtl_base_warn_component_unused = 0\n btl_tcp_if_include = 10.0.0.0/8\n");
  write("/.dockerenv", "");
}

TEST(CollectEnvironment, ReadsARecordedTree) {
  const ScratchDir scratch;
  WriteTree(scratch.path());
  const Environment environment = CollectEnvironment({.programs = false, .root = scratch.path()});
  EXPECT_EQ(environment.nvidia_driver, "550.54.15");
  EXPECT_THAT(environment.gpus,
              ElementsAre(Gpu{"0000:1b:00.0", "GPU-11aa", 0}, Gpu{"0000:43:00.0", "GPU-22bb", 1}));
  EXPECT_TRUE(environment.infiniband);
  EXPECT_TRUE(environment.container);
  EXPECT_THAT(environment.mpi_parameters, ElementsAre(Pair("btl_tcp_if_include", "10.0.0.0/8")));
}

TEST(CollectEnvironment, ReadsThisMachine) {
  setenv("SLURM_JWT", "secret", 1);
  setenv("NCCL_DEBUG", "INFO", 1);
  setenv("HOME_OF_NOBODY", "x", 1);
  const Environment environment = CollectEnvironment({.programs = true, .root = {}});
  EXPECT_FALSE(environment.Has("SLURM_JWT"));
  EXPECT_FALSE(environment.Has("HOME_OF_NOBODY"));
  EXPECT_EQ(environment.Variable("NCCL_DEBUG"), "INFO");
  EXPECT_FALSE(environment.host.empty());
  EXPECT_GE(environment.cores, 1);
  EXPECT_LE(environment.physical_cores, environment.cores);
  EXPECT_EQ(environment.mpi_loaded, environment.mpi_built);
  EXPECT_EQ(environment.mpi_libraries.size(), 1u);
  EXPECT_NE(environment.mpirun, "");
}

TEST(CollectEnvironment, LooksForTheComponentsThatMpiIsAskedFor) {
  using Absent = std::map<std::string, std::string>;
  const auto absent = [](const char* btl, const char* pml) {
    setenv("OMPI_MCA_btl", btl, 1);
    setenv("OMPI_MCA_pml", pml, 1);
    return CollectEnvironment({}).absent_mpi_components;
  };
  EXPECT_EQ(absent("self,vader,tcp", "ob1"), Absent());
  EXPECT_EQ(absent("", ""), Absent());
  EXPECT_EQ(absent("^openib,banana", "^banana"), Absent());
  EXPECT_EQ(absent("self,banana,mango", "cm,../ob1"),
            (Absent{{"OMPI_MCA_btl", "banana"}, {"OMPI_MCA_pml", "../ob1"}}));
  // Of mpirun's own, which Open MPI 5 has elsewhere; what may be asked for in vain.
  setenv("OMPI_MCA_shmem", "mmap,banana", 1);
  setenv("OMPI_MCA_rmaps", "round_robin,banana", 1);
  setenv("OMPI_MCA_mtl", "banana", 1);
  Absent expected = {{"OMPI_MCA_shmem", "banana"}};
  if (CollectEnvironment({}).mpi_loaded[0] == '4') expected["OMPI_MCA_rmaps"] = "banana";
  EXPECT_EQ(absent("", ""), expected);
  for (const char* name : {"OMPI_MCA_shmem", "OMPI_MCA_rmaps", "OMPI_MCA_mtl"}) unsetenv(name);
  // PMIx takes any of a list; it crashes without one, in some frameworks.
  setenv("PMIX_MCA_gds", "banana,hash", 1);
  setenv("PMIX_MCA_preg", "^banana", 1);
  setenv("PMIX_MCA_psec", "mango,banana", 1);
  setenv("PMIX_MCA_plog", "banana", 1);
  setenv("PMIX_MCA_mca_base_component_show_load_errors", "0", 1);
  setenv("OPAL_PREFIX", "/nowhere", 1);
  EXPECT_EQ(absent("", ""), (Absent{{"PMIX_MCA_psec", "mango"}, {"OPAL_PREFIX", "/nowhere"}}));
  setenv("OPAL_PREFIX", "/usr", 1);
  for (const char* name : {"gds", "preg", "psec", "plog"})
    unsetenv(absl::StrCat("PMIX_MCA_", name).c_str());
  EXPECT_EQ(absent("", ""), Absent());
  // A vendor's, in a folder that the user names.
  const std::string folder = testing::TempDir() + "/components";
  std::filesystem::create_directory(folder);
  std::ofstream(folder + "/mca_btl_banana.so") << "x";
  setenv("OMPI_MCA_mca_base_component_path", ("/nowhere:" + folder).c_str(), 1);
  EXPECT_EQ(absent("self,banana,mango", ""), (Absent{{"OMPI_MCA_btl", "mango"}}));
}

}  // namespace
}  // namespace trireme
