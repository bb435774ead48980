#include "parallel/control_plane.h"

#include <gtest/gtest.h>

#include <set>

#include "absl/strings/str_cat.h"
#include "tests/parallel/world.h"

namespace trireme {
namespace {

// Lengths around the packet of Broadcast (1,016 bytes), MPI's eager limit (4 KiB), and beyond.
constexpr size_t kLengths[] = {0, 1, 15, 16, 1015, 1016, 1017, 4096, 100'000, 5'000'000};

std::string Message(size_t length, int seed) {
  std::string bytes(length, '\0');
  for (size_t i = 0; i < length; ++i) bytes[i] = static_cast<char>(i * 31 + seed * 7 + i / 256);
  return bytes;
}

TEST(ControlPlane, KnowsWhoAndWhere) {
  ControlPlane& world = World();
  const auto ranks = world.AllGather(std::to_string(world.rank()));
  ASSERT_EQ(ranks.size(), static_cast<size_t>(world.size()));
  for (int r = 0; r < world.size(); ++r) EXPECT_EQ(ranks[r], std::to_string(r));
  EXPECT_FALSE(world.host().empty());
  // (host, local rank) is unique and local ranks are below the local size.
  const auto places = world.AllGather(absl::StrCat(world.host(), " ", world.local_rank()));
  EXPECT_EQ(std::set<std::string>(places.begin(), places.end()).size(), places.size());
  EXPECT_GE(world.local_rank(), 0);
  EXPECT_LT(world.local_rank(), world.local_size());
  EXPECT_LE(world.local_size(), world.size());
}

TEST(ControlPlane, BroadcastFromEveryRoot) {
  ControlPlane& world = World();
  for (int root = 0; root < world.size(); ++root) {
    for (size_t length : kLengths) {
      std::string bytes = world.rank() == root ? Message(length, root) : "something else";
      world.Broadcast(&bytes, root);
      EXPECT_TRUE(bytes == Message(length, root)) << length << " bytes from " << root;
    }
  }
}

TEST(ControlPlane, GatherAndAllGatherOfDifferentLengths) {
  ControlPlane& world = World();
  for (size_t length : kLengths) {
    // Odd ranks send nothing at all.
    const auto length_of = [&](int r) { return r % 2 == 0 ? length + r : 0; };
    const std::string mine = Message(length_of(world.rank()), world.rank());
    for (int root = 0; root < world.size(); ++root) {
      const auto got = world.Gather(mine, root);
      if (world.rank() != root) {
        EXPECT_TRUE(got.empty());
        continue;
      }
      ASSERT_EQ(got.size(), static_cast<size_t>(world.size()));
      for (int r = 0; r < world.size(); ++r) EXPECT_TRUE(got[r] == Message(length_of(r), r));
    }
    const auto all = world.AllGather(mine);
    ASSERT_EQ(all.size(), static_cast<size_t>(world.size()));
    for (int r = 0; r < world.size(); ++r) EXPECT_TRUE(all[r] == Message(length_of(r), r));
  }
}

TEST(ControlPlane, AgreeGivesEveryRankTheErrorOfTheLowestFailingOne) {
  ControlPlane& world = World();
  EXPECT_TRUE(world.Agree(absl::OkStatus()).ok());
  for (int failing = 0; failing < world.size(); ++failing) {
    const absl::Status mine =
        world.rank() < failing
            ? absl::OkStatus()
            : absl::DataLossError(absl::StrCat("shard ", world.rank(), ": short\nread"));
    const absl::Status agreed = world.Agree(mine);
    EXPECT_EQ(agreed, absl::DataLossError(absl::StrCat("shard ", failing, ": short\nread")));
  }
  for (int only = 0; only < world.size(); ++only) {
    const absl::Status mine = world.rank() == only ? absl::NotFoundError("") : absl::OkStatus();
    EXPECT_EQ(world.Agree(mine), absl::NotFoundError(""));
  }
  // Longer than the first packet.
  const std::string text(3000, 'x');
  EXPECT_EQ(world.Agree(absl::InternalError(text)), absl::InternalError(text));
}

TEST(ControlPlane, MessagesArriveInOrderPerPeerAndChannel) {
  ControlPlane& world = World();
  constexpr int kMessages = 50;
  // Everybody, this rank included, gets all messages before anybody receives one: Send must not
  // wait.
  for (int i = 0; i < kMessages; ++i) {
    for (int peer = 0; peer < world.size(); ++peer) {
      for (int channel : {0, 5}) {
        const size_t length = kLengths[(i + channel) % 9];
        world.Send(peer, channel,
                   absl::StrCat(world.rank(), "/", channel, "/", i, Message(length, i)));
      }
    }
  }
  // The other channel first, and peers from the last to the first.
  for (int channel : {5, 0}) {
    for (int peer = world.size() - 1; peer >= 0; --peer) {
      for (int i = 0; i < kMessages; ++i) {
        const size_t length = kLengths[(i + channel) % 9];
        EXPECT_TRUE(world.Receive(peer, channel) ==
                    absl::StrCat(peer, "/", channel, "/", i, Message(length, i)));
      }
      EXPECT_EQ(world.TryReceive(peer, channel), std::nullopt);
    }
  }
  world.FlushSends();
  world.Barrier();
}

TEST(ControlPlane, TryReceiveDoesNotWait) {
  ControlPlane& world = World();
  const int next = (world.rank() + 1) % world.size();
  const int previous = (world.rank() + world.size() - 1) % world.size();
  EXPECT_EQ(world.TryReceive(previous, 3), std::nullopt);
  world.Barrier();  // nobody has sent yet
  world.Send(next, 3, "ping");
  std::optional<std::string> got;
  while (!got.has_value()) got = world.TryReceive(previous, 3);
  EXPECT_EQ(*got, "ping");
  world.Barrier();
}

TEST(ControlPlane, FlushSendsReturnsOnceLargeMessagesAreDelivered) {
  ControlPlane& world = World();
  if (world.rank() == 0) {
    for (int peer = 1; peer < world.size(); ++peer) world.Send(peer, 1, Message(5'000'000, peer));
    world.FlushSends();
  } else {
    EXPECT_TRUE(world.Receive(0, 1) == Message(5'000'000, world.rank()));
  }
  world.Barrier();
}

}  // namespace
}  // namespace trireme
