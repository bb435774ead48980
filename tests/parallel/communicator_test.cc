#include "parallel/communicator.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "parallel/mpi_communicator.h"
#include "parallel/process_groups.h"
#include "parallel/staged_communicator.h"
#include "tests/parallel/host_device.h"
#include "tests/parallel/world.h"

namespace trireme {
namespace {

// What `rank` contributes at `i`. Every fourth time the first two ranks cancel at a magnitude where
// fp32 keeps few bits of the others, so that another order of the sum gives other bits in every
// element type.
float Value(int rank, int64_t i, int salt) {
  if (i % 4 == 1 && rank < 2) return rank == 0 ? 16384.0f : -16384.0f;
  uint32_t h =
      static_cast<uint32_t>(i * 2654435761u) ^ static_cast<uint32_t>(rank * 40503 + salt * 977 + 1);
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  h = (h ^ (h >> 12)) * 0x297a2d39u;
  h ^= h >> 15;
  return std::ldexp(static_cast<float>(h & 0xffff) / 65536.0f - 0.5f,
                    static_cast<int>(h >> 16) % 13 - 4);
}

template <typename T>
std::vector<T> Values(int rank, int64_t n, int salt) {
  std::vector<T> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = FromFloat<T>(Value(rank, i, salt));
  return values;
}

template <typename T>
T SumOf(int ranks, int64_t i, int salt, bool reversed = false) {
  float sum = 0;
  for (int k = 0; k < ranks; ++k) {
    const int r = reversed ? ranks - 1 - k : k;
    const float value = ToFloat(FromFloat<T>(Value(r, i, salt)));
    sum = k == 0 ? value : sum + value;
  }
  return FromFloat<T>(sum);
}

template <typename T>
TensorView View(std::vector<T>& values) {
  return TensorView(values.data(), kDTypeOf<T>, Shape{static_cast<int64_t>(values.size())});
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Around the sizes where the algorithm changes, for any of the element types; odd; empty; and 1M.
std::vector<int64_t> Sizes() {
  std::vector<int64_t> sizes = {0, 1, 2, 3, 5, 63, 1000};
  for (int64_t bytes : {1024, 2048, 4096, 8192, 16384, 65536, 256 << 10}) {
    for (int64_t item : {2, 4}) sizes.insert(sizes.end(), {bytes / item, bytes / item + 1});
  }
  sizes.push_back((1 << 20) + 3);
  return sizes;
}

template <typename T>
class CommunicatorTest : public testing::Test {};
// A tag per element type: _Float16 itself has no typeinfo to name a test by.
template <typename T>
struct Element {
  using Type = T;
};
using FloatTypes = testing::Types<Element<float>, Element<BF16>, Element<F16>>;
TYPED_TEST_SUITE(CommunicatorTest, FloatTypes);

TYPED_TEST(CommunicatorTest, AllReduceIsTheSumInRankOrderOnEveryRank) {
  using T = typename TypeParam::Type;
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  const auto messages = NewMpiCommunicator(World(), 0, {.use_shared_memory = false});
  ASSERT_EQ(comm->size(), World().size());
  ASSERT_EQ(comm->rank(), World().rank());
  int salt = 0;
  for (int64_t n : Sizes()) {
    std::vector<T> data = Values<T>(comm->rank(), n, ++salt), by_messages = data;
    comm->AllReduceSum(host.stream, View(data));
    messages->AllReduceSum(host.stream, View(by_messages));
    ASSERT_TRUE(host.stream.Synchronize().ok());
    EXPECT_TRUE(SameBits(data, by_messages)) << n;
    int64_t wrong = 0, order_matters = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T want = SumOf<T>(comm->size(), i, salt);
      wrong += std::memcmp(&data[i], &want, sizeof(T)) != 0;
      if (i < 1000) {
        const T reversed = SumOf<T>(comm->size(), i, salt, /*reversed=*/true);
        order_matters += std::memcmp(&reversed, &want, sizeof(T)) != 0;
      }
    }
    EXPECT_EQ(wrong, 0) << "of " << n;
    // Else this test could not see a wrong order. Two summands commute.
    if (comm->size() > 2 && n >= 1000) {
      EXPECT_GT(order_matters, 0);
    }
  }
}

// Many small ones in a row: a rank may be one collective ahead of another, never two.
TYPED_TEST(CommunicatorTest, BackToBackAllReduces) {
  using T = typename TypeParam::Type;
  Host host;
  const std::unique_ptr<Communicator> comms[2] = {
      NewMpiCommunicator(World(), 0), NewMpiCommunicator(World(), 0, {.use_shared_memory = false})};
  for (int round = 0; round < 1000; ++round) {
    const bool shared = round % 100 < 50;
    const auto& comm = shared ? comms[0] : comms[1];
    const int64_t n = 1 + round % 7 * 300;
    std::vector<T> data = Values<T>(comm->rank(), n, round);
    comm->AllReduceSum(host.stream, View(data));
    const T first = SumOf<T>(comm->size(), 0, round), last = SumOf<T>(comm->size(), n - 1, round);
    ASSERT_EQ(0, std::memcmp(&data[0], &first, sizeof(T))) << round;
    ASSERT_EQ(0, std::memcmp(&data[n - 1], &last, sizeof(T))) << round;
  }
}

void CheckAllGather(Communicator* comm) {
  Host host;
  for (int64_t n : Sizes()) {
    const std::vector<float> in = Values<float>(comm->rank(), n, 3);
    std::vector<float> out(n * comm->size(), -1.0f);
    const ConstTensorView in_view(in.data(), DType::kF32, Shape{n});
    comm->AllGather(host.stream, in_view, View(out));
    std::vector<float> in_place(n * comm->size(), -1.0f);
    std::copy(in.begin(), in.end(), in_place.begin() + comm->rank() * n);
    const TensorView part = View(in_place).Rows(comm->rank() * n, n);
    comm->AllGather(host.stream, part, View(in_place));
    std::vector<float> want;
    for (int r = 0; r < comm->size(); ++r) {
      const std::vector<float> theirs = Values<float>(r, n, 3);
      want.insert(want.end(), theirs.begin(), theirs.end());
    }
    EXPECT_TRUE(out == want) << n;
    EXPECT_TRUE(in_place == want) << n;
  }
}
TEST(Communicator, AllGatherPlacesRanksInOrder) {
  CheckAllGather(NewMpiCommunicator(World(), 0).get());
}
TEST(Communicator, AllGatherByMessagesPlacesRanksInOrder) {
  CheckAllGather(NewMpiCommunicator(World(), 0, {.use_shared_memory = false}).get());
}

TEST(Communicator, AllGatherOfBytesOfAnyLength) {
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  for (int64_t n : {1, 3, 17, 4097}) {
    std::vector<uint8_t> in(n, static_cast<uint8_t>(comm->rank() + 1)), out(n * comm->size());
    comm->AllGather(host.stream, ConstTensorView(in.data(), DType::kU8, Shape{n}),
                    TensorView(out.data(), DType::kU8, Shape{n * comm->size()}));
    for (int64_t i = 0; i < n * comm->size(); ++i) ASSERT_EQ(out[i], i / n + 1);
  }
}

// Each rank sends to the next with two buffers: it fills one while the other may still be on its
// way.
TEST(Communicator, RingWithTwoBuffersInFlight) {
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  if (comm->size() == 1) GTEST_SKIP() << "a ring needs two ranks";
  const int next = (comm->rank() + 1) % comm->size();
  const int previous = (comm->rank() + comm->size() - 1) % comm->size();
  for (int64_t n : {1, 1000, 300'000}) {
    std::vector<float> buffers[2] = {std::vector<float>(n), std::vector<float>(n)}, in(n);
    int64_t tickets[2] = {0, 0};
    for (int round = 0; round < 10; ++round) {
      const int slot = round % 2;
      if (round >= 2) comm->WaitSend(host.stream, tickets[slot]);
      buffers[slot] = Values<float>(comm->rank(), n, round);
      tickets[slot] = comm->Send(host.stream, View(buffers[slot]), next);
      if (round == 0) continue;  // the peer's Recv lags one behind
      comm->Recv(host.stream, View(in), previous);
      EXPECT_TRUE(in == Values<float>(previous, n, round - 1)) << n << " round " << round;
    }
    comm->Recv(host.stream, View(in), previous);
    EXPECT_TRUE(in == Values<float>(previous, n, 9));
    for (int64_t ticket : tickets) comm->WaitSend(host.stream, ticket);
    for (int64_t ticket : tickets) comm->WaitSend(host.stream, ticket);  // twice is harmless
  }
}

// A stage computes for long after it has sent: its message must get through all the same.
TEST(Communicator, LargeMessageArrivesWhileItsSenderIsElsewhere) {
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  if (comm->size() == 1) GTEST_SKIP() << "a message needs two ranks";
  std::string received = testing::TempDir() + "trireme-received-XXXXXX";
  if (comm->rank() == 0) {
    const int file = mkstemp(received.data());
    ASSERT_GE(file, 0);
    close(file);
  }
  World().Broadcast(&received);
  std::vector<float> large(2'000'000, static_cast<float>(comm->rank()));
  if (comm->rank() == 0) {
    const int64_t ticket = comm->Send(host.stream, View(large), 1);
    bool gone = false;  // rank 1 removes the file when it has the message
    for (int i = 0; i < 20'000 && !gone; ++i) {
      gone = access(received.c_str(), F_OK) != 0;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_TRUE(gone) << "the message waits for its sender";
    comm->WaitSend(host.stream, ticket);
  } else if (comm->rank() == 1) {
    comm->Recv(host.stream, View(large), 0);
    EXPECT_EQ(large.back(), 0.0f);
    EXPECT_EQ(unlink(received.c_str()), 0);
  }
  World().Barrier();
}

// Rank 0's large message needs rank 0 inside MPI to get through, but rank 0 has gone on to a
// collective in which the receiver joins only later: waiting for a collective must keep messages
// moving.
TEST(Communicator, CollectiveWaitsKeepMessagesMoving) {
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  std::vector<float> large(2'000'000, 3.0f), one = {1.0f};
  for (int peer = 1; comm->rank() == 0 && peer < comm->size(); ++peer) {
    comm->Send(host.stream, View(large), peer);
    World().Send(peer, 0, std::string(3'000'000, 'x'));
  }
  if (comm->rank() != 0) {
    large.assign(large.size(), 0.0f);
    comm->Recv(host.stream, View(large), 0);
    EXPECT_EQ(large.back(), 3.0f);
    EXPECT_EQ(World().Receive(0, 0).size(), 3'000'000u);
  }
  comm->AllReduceSum(host.stream, View(one));
  EXPECT_EQ(one[0], static_cast<float>(comm->size()));
  World().FlushSends();
}

TEST(Communicator, BytesMovedGrow) {
  Host host;
  const auto comm = NewMpiCommunicator(World(), 0);
  std::vector<float> data(1 << 16);
  comm->AllReduceSum(host.stream, View(data));
  // A rank must at least send its array's worth less its own piece and get as much; no more than
  // gather-and-sum.
  const int64_t bytes = static_cast<int64_t>(data.size()) * 4, others = comm->size() - 1;
  EXPECT_GE(comm->bytes_moved(), 2 * bytes * others / comm->size());
  EXPECT_LE(comm->bytes_moved(), 2 * bytes * others);
}

void CheckGroups(const Topology& topology) {
  Host host;
  const auto groups = CreateProcessGroups(World(), topology, host.device);
  ASSERT_TRUE(groups.ok()) << groups.status();
  EXPECT_EQ(groups->tp->size(), topology.tp_size);
  EXPECT_EQ(groups->pp->size(), topology.pp_size);
  EXPECT_EQ(groups->tp->rank(), groups->tp_index());
  EXPECT_EQ(groups->pp->rank(), groups->pp_index());
  // Who is in my groups: sums of 2^rank.
  std::vector<float> bit = {std::ldexp(1.0f, World().rank())};
  groups->tp->AllReduceSum(host.stream, View(bit));
  float want = 0;
  for (int tp = 0; tp < topology.tp_size; ++tp) {
    want += std::ldexp(1.0f, topology.RankOf(groups->dp_index(), groups->pp_index(), tp));
  }
  EXPECT_EQ(bit[0], want);
  std::vector<int32_t> me = {World().rank()}, stages(topology.pp_size);
  groups->pp->AllGather(host.stream, View(me), View(stages));
  for (int pp = 0; pp < topology.pp_size; ++pp) {
    EXPECT_EQ(stages[pp], topology.RankOf(groups->dp_index(), pp, groups->tp_index()));
  }
  EXPECT_EQ(groups->first_stage(), groups->pp_index() == 0);
  EXPECT_EQ(groups->last_stage(), groups->pp_index() == topology.pp_size - 1);
}

TEST(ProcessGroups, EveryTopologyOfThisManyRanks) {
  const int n = World().size();
  for (int tp = 1; tp <= n; ++tp) {
    for (int pp = 1; pp <= n; ++pp) {
      if (n % (tp * pp) == 0) CheckGroups(Topology{tp, pp, n / (tp * pp)});
    }
  }
}

// A device whose memory MPI must not see: calls go through the host.
TYPED_TEST(CommunicatorTest, StagedThroughTheHostGivesTheSameBits) {
  using T = typename TypeParam::Type;
  HostDevice device(/*host_memory=*/false);
  HostStream stream(&device);
  const auto staged = NewStagedCommunicator(NewMpiCommunicator(World(), 0, {.any_stream = true}));
  ASSERT_EQ(staged->size(), World().size());
  ASSERT_EQ(staged->rank(), World().rank());
  const int n = staged->size(), next = (staged->rank() + 1) % n,
            previous = (staged->rank() + n - 1) % n;
  int salt = 100;
  for (const int64_t count : {0, 1, 1000, 100'003}) {
    std::vector<T> data = Values<T>(staged->rank(), count, ++salt), received(count);
    const std::vector<T> sent = data;
    const int64_t ticket = n > 1 ? staged->Send(stream, View(data), next) : 0;
    std::vector<T> all(count * n);
    staged->AllGather(stream, View(data), View(all));
    staged->AllReduceSum(stream, View(data));
    if (n > 1) {
      staged->Recv(stream, View(received), previous);
      staged->WaitSend(stream, ticket);
      EXPECT_TRUE(SameBits(received, Values<T>(previous, count, salt)));
    }
    for (int64_t i = 0; i < count; ++i) {
      const T want = SumOf<T>(n, i, salt);
      ASSERT_EQ(std::memcmp(&data[i], &want, sizeof(T)), 0) << i;
    }
    for (int r = 0; r < n; ++r) {
      const std::vector<T> theirs = Values<T>(r, count, salt);
      EXPECT_TRUE(
          SameBits(theirs, std::vector<T>(all.begin() + r * count, all.begin() + (r + 1) * count)));
    }
  }
}

TEST(ProcessGroups, TwoRanksOnOneGpuNeedLeave) {
  HostDevice device(/*host_memory=*/false);
  const Topology topology{World().size(), 1, 1};
  const auto refused = CreateProcessGroups(World(), topology, device);
  if (World().size() > 1) {
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(refused.status().message().find("--allow-shared-gpu"), absl::string_view::npos);
  } else {
    EXPECT_TRUE(refused.ok());
  }
  const auto groups = CreateProcessGroups(World(), topology, device, {.allow_shared_gpu = true});
  ASSERT_TRUE(groups.ok()) << groups.status();
  HostStream stream(&device);
  std::vector<float> one = {1.0f};
  groups->tp->AllReduceSum(stream, View(one));
  EXPECT_EQ(one[0], static_cast<float>(World().size()));
  groups->tp_of_host().AllReduceSum(stream, View(one));
  EXPECT_EQ(one[0], static_cast<float>(World().size() * World().size()));
}

TEST(ProcessGroups, NcclWithoutItsModuleIsAClearError) {
  if (World().size() == 1) GTEST_SKIP() << "a group needs two ranks";
  HostDevice device(/*host_memory=*/false);
  const auto groups =
      CreateProcessGroups(World(), {World().size(), 1, 1}, device,
                          {.collectives = Collectives::kNccl, .allow_shared_gpu = true});
  EXPECT_EQ(groups.status().code(), absl::StatusCode::kUnavailable) << groups.status();
}

TEST(ProcessGroups, SingleRankNeedsNoMpi) {
  const ProcessGroups groups = SingleRank();
  EXPECT_EQ(groups.topology, Topology{});
  EXPECT_TRUE(groups.first_stage() && groups.last_stage());
  Host host;
  std::vector<float> data = {1, 2, 3}, out(3);
  groups.tp->AllReduceSum(host.stream, View(data));
  groups.tp->AllGather(host.stream, View(data), View(out));
  EXPECT_EQ(data, (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(out, data);
}

}  // namespace
}  // namespace trireme
