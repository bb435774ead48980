#include "launch/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/launch/recorded.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(Placement, CoreLists) {
  EXPECT_THAT(ParseCoreList("0-3,8,10-11\n"), ElementsAre(0, 1, 2, 3, 8, 10, 11));
  EXPECT_THAT(ParseCoreList("5"), ElementsAre(5));
  for (const char* bad : {"", "\n", "x", "3-1", "-1", "1-", "0-99999999", "1,,x", "1-2-3"})
    EXPECT_THAT(ParseCoreList(bad), IsEmpty()) << bad;
}

// Two sockets, two GPUs on the second.
std::string Tree(const ScratchDir& scratch) {
  for (const auto& [node, cores] : {std::pair{0, "0-15"}, {1, "16-31"}}) {
    const std::string folder = absl::StrCat(scratch.path(), "/sys/devices/system/node/node", node);
    std::filesystem::create_directories(folder);
    std::ofstream(folder + "/cpulist") << cores << "\n";
  }
  return scratch.path();
}
constexpr char kGpus[] = R"({"gpus": [{"pci_address": "0000:1b:00.0", "numa_node": 0},
                                      {"pci_address": "0000:43:00.0", "numa_node": 1},
                                      {"pci_address": "0000:63:00.0", "numa_node": -1},
                                      {"pci_address": "0000:83:00.0", "numa_node": 7}])";

TEST(Placement, FollowsTheGpu) {
  const ScratchDir scratch;
  const std::string root = Tree(scratch);
  const Environment environment = Recorded("openmpi4", absl::StrCat(kGpus, "}"));
  EXPECT_EQ(PlacementOf(environment, 0, root)->numa_node, 0);
  const std::optional<Placement> second = PlacementOf(environment, 1, root);
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(second->gpu, "0000:43:00.0");
  EXPECT_EQ(second->cores.front(), 16);
  EXPECT_EQ(second->cores.size(), 16u);
  // A machine that does not say, a node that is not in /sys, a rank without a GPU.
  EXPECT_EQ(PlacementOf(environment, 2, root), std::nullopt);
  EXPECT_EQ(PlacementOf(environment, 3, root), std::nullopt);
  EXPECT_EQ(PlacementOf(environment, 4, root), std::nullopt);
  EXPECT_EQ(PlacementOf(Recorded("openmpi4"), 0, root), std::nullopt);
}

TEST(Placement, FollowsWhatIsVisible) {
  const ScratchDir scratch;
  const std::string root = Tree(scratch);
  const auto node = [&](const char* visible, int local_rank) {
    const Environment environment = Recorded(
        "openmpi4",
        absl::StrCat(kGpus, R"(, "variables": {"CUDA_VISIBLE_DEVICES": ")", visible, "\"}}"));
    const std::optional<Placement> placement = PlacementOf(environment, local_rank, root);
    return placement ? placement->numa_node : -1;
  };
  EXPECT_EQ(node("1,0", 0), 1);
  EXPECT_EQ(node("1,0", 1), 0);
  EXPECT_EQ(node("1", 3), 1);  // each rank has been given its own
  EXPECT_EQ(node("", 0), -1);
}

std::vector<int> CoresOfThisThread() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof(set), &set);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

// On threads of their own: the test's own thread stays where it was.
TEST(Placement, BindsTheThreadAndThoseItStarts) {
  const std::vector<int> all = CoresOfThisThread();
  std::thread([&all] {
    const Placement last{.gpu = "", .numa_node = 0, .cores = {all.back(), CPU_SETSIZE - 1}};
    EXPECT_TRUE(BindTo(last));
    EXPECT_THAT(CoresOfThisThread(), ElementsAre(all.back()));
    std::thread([&all] { EXPECT_THAT(CoresOfThisThread(), ElementsAre(all.back())); }).join();
  }).join();
  std::thread([&all] {
    const Placement elsewhere{.gpu = "", .numa_node = 0, .cores = {CPU_SETSIZE - 1}};
    EXPECT_FALSE(BindTo(elsewhere));
    EXPECT_EQ(CoresOfThisThread(), all);
  }).join();
}

}  // namespace
}  // namespace trireme
