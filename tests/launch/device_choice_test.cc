#include "launch/device_choice.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

using Ranks = std::vector<GpusOfRank>;

void ExpectCpu(const Ranks& ranks, const std::string& warning, bool allow_shared_gpu = false) {
  const DeviceChoice choice = ChooseDevice(ranks, allow_shared_gpu);
  EXPECT_EQ(choice.device, "cpu");
  EXPECT_EQ(choice.warning, warning);
}
void ExpectCuda(const Ranks& ranks, bool allow_shared_gpu = false) {
  const DeviceChoice choice = ChooseDevice(ranks, allow_shared_gpu);
  EXPECT_EQ(choice.device, "cuda");
  EXPECT_EQ(choice.warning, "");
}

TEST(DeviceChoiceTest, AGpuForEachRankIsTaken) {
  ExpectCuda({{"a", {"GPU 1"}}});
  ExpectCuda({{"a", {"GPU 1", "GPU 2"}}, {"a", {"GPU 1", "GPU 2"}}});
  // GPUs of two hosts have the same addresses.
  ExpectCuda({{"a", {"GPU 1"}}, {"b", {"GPU 1"}}});
}

TEST(DeviceChoiceTest, RanksMayEachSeeTheirOwnAlone) {
  ExpectCuda({{"a", {"GPU 1"}}, {"a", {"GPU 2"}}});
}

TEST(DeviceChoiceTest, MoreRanksThanGpusTakeTheCpu) {
  const Ranks two = {{"b", {"GPU 1"}}, {"b", {"GPU 1"}}};
  ExpectCpu(two,
            "--device auto takes the CPU: host b has 2 ranks and 1 GPU they can use: start fewer "
            "ranks there, or share GPUs with --allow-shared-gpu");
  ExpectCuda(two, /*allow_shared_gpu=*/true);
}

TEST(DeviceChoiceTest, AMachineWithoutGpusSaysNothing) { ExpectCpu({{"a"}, {"a"}}, ""); }

TEST(DeviceChoiceTest, AGpuThatCannotBeUsedIsTold) {
  ExpectCpu({{"a", {}, "--device cuda: libtrireme_cuda.so is not whole"}},
            "--device auto takes the CPU: host a: libtrireme_cuda.so is not whole");
  // Sharing is of no use where there is none.
  ExpectCpu({{"a", {"GPU 1"}}, {"b"}},
            "--device auto takes the CPU: host b has no NVIDIA driver, and others have", true);
  ExpectCpu({{"b"}, {"a", {}, "the driver is old"}},
            "--device auto takes the CPU: host a: the driver is old");
}

}  // namespace
}  // namespace trireme
