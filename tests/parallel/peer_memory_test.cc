// Memory that ranks map of each other: shared memory of this host in place of a GPU's. Had by all
// ranks or by none, closed before it is freed, and good for sums over peers between processes.
#include "parallel/peer_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "tests/parallel/world.h"
#if defined(TRIREME_HOST_CUDA)
#include "kernels/cuda/peer_sum.h"
#endif

namespace trireme {
namespace {

constexpr size_t kBytes = 1 << 16;

class SharedPeerMemory final : public PeerMemory {
 public:
  // `fails`: it cannot open others.
  SharedPeerMemory(int rank, bool fails)
      : name_(absl::StrCat("/trireme_peer_test_", getpid(), "_", rank)), fails_(fails) {
    const int file = shm_open(name_.c_str(), O_CREAT | O_RDWR, 0600);
    EXPECT_EQ(ftruncate(file, kBytes), 0);
    mine_ = Map(file);
  }
  ~SharedPeerMemory() override {
    EXPECT_TRUE(open_.empty()) << "freed before it was closed";
    munmap(mine_, kBytes);
    shm_unlink(name_.c_str());
  }
  std::string handle() const override { return name_; }
  absl::Status Open(int rank, std::span<const std::string> handles) override {
    rank_ = rank;
    if (fails_) return absl::UnavailableError("no peer access");
    for (const std::string& name : handles) {
      const int file = shm_open(name.c_str(), O_RDWR, 0600);
      if (file < 0) return absl::UnavailableError(absl::StrCat(name, " is not there"));
      open_.push_back(Map(file));
    }
    return absl::OkStatus();
  }
  void Close() override {
    for (char* memory : open_) munmap(memory, kBytes);
    open_.clear();
  }
  int64_t bytes() const override { return kBytes; }

  int rank() const { return rank_; }
  const std::vector<char*>& open() const { return open_; }

 private:
  static char* Map(int file) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    EXPECT_NE(memory, MAP_FAILED);
    return static_cast<char*>(memory);
  }
  const std::string name_;
  const bool fails_;
  int rank_ = -1;
  char* mine_ = nullptr;
  std::vector<char*> open_;
};

std::vector<int> Everybody() {
  std::vector<int> members(World().size());
  std::iota(members.begin(), members.end(), 0);
  return members;
}

PeerMapping::Make Making(bool fails = false) {
  return [fails]() -> absl::StatusOr<std::unique_ptr<PeerMemory>> {
    return std::make_unique<SharedPeerMemory>(World().rank(), fails);
  };
}

TEST(PeerMapping, AGroupOfOneHasNone) {
  bool made = false;
  const auto mapping = PeerMapping::Create(World(), {World().rank()}, [&] {
    made = true;
    return Making()();
  });
  EXPECT_EQ(mapping.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(made);
}

TEST(PeerMapping, WhatOneRankCannotDoNoneDoes) {
  if (World().size() == 1) GTEST_SKIP() << "a group needs two ranks";
  const bool last = World().rank() == World().size() - 1;
  auto mapping = PeerMapping::Create(World(), Everybody(), Making(/*fails=*/last));
  EXPECT_EQ(mapping.status().message(), "no peer access");
  mapping = PeerMapping::Create(World(), Everybody(),
                                [&]() -> absl::StatusOr<std::unique_ptr<PeerMemory>> {
                                  if (last) return absl::UnavailableError("no memory");
                                  return Making()();
                                });
  EXPECT_EQ(mapping.status().message(), "no memory");
}

TEST(PeerMapping, RanksWriteIntoEachOthersMemory) {
  if (World().size() == 1) GTEST_SKIP() << "a group needs two ranks";
  // Groups of neighbours, in an order of their own: the ranks are those of the group.
  const int first = World().rank() / 2 * 2;
  const auto mapping = PeerMapping::Create(World(), {first + 1, first}, Making());
  ASSERT_TRUE(mapping.ok()) << mapping.status();
  const auto& memory = static_cast<SharedPeerMemory&>((*mapping)->memory());
  ASSERT_EQ(memory.rank(), World().rank() == first ? 1 : 0);
  for (char* peer : memory.open()) peer[memory.rank()] = static_cast<char>(World().rank() + 1);
  World().Barrier();
  EXPECT_EQ(memory.open()[memory.rank()][0], first + 2);
  EXPECT_EQ(memory.open()[memory.rank()][1], first + 1);
  World().Barrier();
}

#if defined(TRIREME_HOST_CUDA)
TEST(PeerMapping, CarriesSumsBetweenProcesses) {
  if (World().size() == 1) GTEST_SKIP() << "a group needs two ranks";
  const auto mapping = PeerMapping::Create(World(), Everybody(), Making());
  ASSERT_TRUE(mapping.ok()) << mapping.status();
  const auto& memory = static_cast<SharedPeerMemory&>((*mapping)->memory());
  uint64_t launched = 0;
  cuda::PeerGroup group{.rank = memory.rank(),
                        .size = World().size(),
                        .half_bytes = (kBytes - cuda::kPeerFlagBytes) / 2 / 16 * 16,
                        .launched = &launched};
  std::copy(memory.open().begin(), memory.open().end(), group.memory);
  for (int i = 0; i < 20; ++i) {
    std::vector<float> data(100 + 30 * (i % 3));
    for (size_t j = 0; j < data.size(); ++j)
      data[j] = static_cast<float>((World().rank() + 1) * (i + 1)) + static_cast<float>(j);
    const TensorView view(data.data(), DType::kF32, {static_cast<int64_t>(data.size())});
    PeerSum(nullptr, group, i % 2 == 0 ? cuda::PeerPath::kOneShot : cuda::PeerPath::kTwoShot, view);
    const int ranks = World().size();
    for (size_t j = 0; j < data.size(); ++j) {
      ASSERT_EQ(data[j], static_cast<float>(ranks * (ranks + 1) / 2 * (i + 1)) +
                             static_cast<float>(ranks) * static_cast<float>(j));
    }
  }
}
#endif

}  // namespace
}  // namespace trireme
