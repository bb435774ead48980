// Sums over peer memory, with a thread for each rank: the bits of the CPU's sum over ranks and of
// the unfused norm, whatever the timing; launches of other shapes in a row, replayed ones, and one
// that is given up.
#include "kernels/cuda/peer_sum.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "parallel/rank_sum.h"
#include "tests/host_cuda/device.h"
#include "tests/host_cuda/peer_ranks.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using cuda::PeerPath;

constexpr float kEps = 1e-5f;
constexpr PeerPath kPaths[] = {PeerPath::kOneShot, PeerPath::kTwoShot};

// What the ranks bring. Every fourth element of the first two ranks nearly cancels, so that another
// order of the sum gives other bits.
std::vector<Tensor> Parts(const PeerRanks& group, DType dtype, Shape shape, uint64_t seed) {
  std::vector<Tensor> parts;
  for (int r = 0; r < group.size(); ++r) {
    parts.push_back(group.cpu().Random(dtype, shape, seed * 100 + r, 4.0));
    const TensorView flat(parts[r].view().data, dtype, {parts[r].view().elements(), 1});
    for (int64_t i = 1; i < flat.dim(0) && r < 2; i += 4)
      Fill(flat.Rows(i, 1), r == 0 ? 4e4 : -4e4);
  }
  return parts;
}

Tensor SumOf(const PeerRanks& group, const std::vector<Tensor>& parts) {
  const TensorView first = parts[0].view();
  Tensor sum = group.cpu().Zeros(first.dtype, first.shape);
  std::vector<const void*> inputs;
  for (const Tensor& part : parts) inputs.push_back(part.view().data);
  SumInOrder(first.dtype, inputs, first.elements(), sum.view().data);
  return sum;
}

class PeerSumTest : public ::testing::TestWithParam<DType> {};

// Sums of all ranks, one after the other on each rank's thread.
struct Sums {
  void Add(const PeerRanks& group, DType dtype, int64_t count, PeerPath path) {
    parts.push_back(Parts(group, dtype, {count}, parts.size() + 1));
    expected.push_back(SumOf(group, parts.back()));
    paths.push_back(path);
  }
  void Run(PeerRanks& group, const std::function<void(int rank, size_t sum)>& before) const {
    group.Run([&](int r) {
      for (size_t i = 0; i < parts.size(); ++i) {
        before(r, i);
        PeerSum(nullptr, group.Of(r), paths[i], parts[i][r].view());
      }
    });
  }
  void Check() const {
    for (size_t i = 0; i < parts.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "sum " << i);
      for (const Tensor& part : parts[i]) ExpectSameBits(part.view(), expected[i].view());
    }
  }
  std::vector<std::vector<Tensor>> parts;  // by sum and rank
  std::vector<Tensor> expected;
  std::vector<PeerPath> paths;
};

// ThreadSanitizer keeps mappings of each thread that has been, of which a process may have 65,530:
// it gets two types, of which f16 does what bf16 does, one norm, and no 8 ranks.
std::vector<DType> Types() {
  std::vector<DType> types = {DType::kF32, DType::kBF16};
  if (!kThreadSanitizer) types.push_back(DType::kF16);
  return types;
}
std::vector<int> RankCounts() {
  std::vector<int> counts = {2, 3, 4};
  if (!kThreadSanitizer) counts.push_back(8);
  return counts;
}

TEST_P(PeerSumTest, HasTheBitsOfTheSumInRankOrder) {
  for (const int ranks : RankCounts()) {
    SCOPED_TRACE(testing::Message() << ranks << " ranks");
    PeerRanks group(ranks);
    Sums sums;
    for (const PeerPath path : kPaths) {
      for (const int64_t count : {1, 7, 16, 97, 512}) sums.Add(group, GetParam(), count, path);
      // Of several blocks, which for eight ranks are too many for a small machine.
      if (ranks < 8) sums.Add(group, GetParam(), 1504, path);
    }
    sums.Run(group, [](int, size_t) {});
    sums.Check();
  }
}

TEST_P(PeerSumTest, TakesAnyAddress) {
  PeerRanks group(2);
  const std::vector<Tensor> parts = Parts(group, GetParam(), {104}, 3);
  const Tensor expected = SumOf(group, parts);
  for (const PeerPath path : kPaths) {
    // One rank's data lies on 16 bytes, the other's does not.
    std::vector<Tensor> shifted;
    for (int r = 0; r < 2; ++r) {
      shifted.push_back(group.cpu().Zeros(GetParam(), {105, 1}));
      std::memcpy(shifted[r].view().Rows(r, 104).data, parts[r].view().data,
                  static_cast<size_t>(parts[r].view().bytes()));
    }
    const auto of = [&](int r) {
      return TensorView(shifted[r].view().Rows(r, 104).data, GetParam(), {104});
    };
    group.Run([&](int r) { PeerSum(nullptr, group.Of(r), path, of(r)); });
    for (int r = 0; r < 2; ++r) ExpectSameBits(of(r), expected.view());
  }
}

// What a rank has of a fused sum: residuals are alike on all ranks, as in a model, but some are
// columns of a wider tensor.
struct Normed {
  Normed(const TestDevice& device, DType dtype, int64_t rows, int64_t width, bool strided)
      : wide(device.Zeros(dtype, {rows, width + (strided ? 8 : 0)})),
        weight(device.Random(dtype, {width}, 12)),
        bias(device.Random(dtype, {width}, 13)),
        out(device.Zeros(dtype, {rows, width})),
        residual(wide.view().Columns(0, width)) {
    for (int64_t row = 0; row < rows; ++row) FillRandom(residual.Rows(row, 1), 20 + row);
  }
  NormParams Params(NormKind kind) const {
    const bool layer = kind == NormKind::kLayer;
    return {kind, weight.view(), layer ? ConstTensorView(bias.view()) : ConstTensorView(), kEps};
  }
  Tensor wide, weight, bias, out;
  TensorView residual;
};

void CheckNorm(const TestDevice& emulator, DType dtype, int ranks, int64_t rows, int64_t width,
               PeerPath path, NormKind kind) {
  PeerRanks group(ranks);
  const std::vector<Tensor> parts = Parts(group, dtype, {rows, width}, rows + width);
  const Normed expected(emulator, dtype, rows, width, false);
  AddNorm(emulator.stream(), expected.residual, SumOf(group, parts).view(), expected.Params(kind),
          expected.out.view());
  std::vector<std::unique_ptr<Normed>> got;
  for (int r = 0; r < ranks; ++r)
    got.push_back(std::make_unique<Normed>(emulator, dtype, rows, width, r == 1));
  group.Run([&](int r) {
    PeerSumAddNorm(nullptr, group.Of(r), path, parts[r].view(), got[r]->residual,
                   got[r]->Params(kind), got[r]->out.view());
  });
  for (const auto& rank : got) {
    ExpectSameBits(rank->out.view(), expected.out.view());
    for (int64_t row = 0; row < rows; ++row)
      ExpectSameBits(rank->residual.Rows(row, 1), expected.residual.Rows(row, 1));
  }
}

TEST_P(PeerSumTest, FusedWithTheNormHasTheBitsOfTheTwoOps) {
  // See Types.
  std::vector<NormKind> kinds = {NormKind::kLayer};
  if (!kThreadSanitizer) kinds.push_back(NormKind::kRms);
  const TestDevice emulator(DeviceCase{.name = "host_cuda", .host_cuda = true});
  struct Size {
    int64_t rows, width;
  };
  // Rows whole in vectors or not, more rows than blocks.
  for (const auto [rows, width] : {Size{1, 264}, Size{3, 100}, Size{2, 17}, Size{35, 32}}) {
    for (const int ranks : RankCounts()) {
      if (rows > 3 && ranks > 2) continue;  // blocks: see above
      for (const PeerPath path : kPaths) {
        for (const NormKind kind : kinds) {
          SCOPED_TRACE(testing::Message()
                       << ranks << " ranks, [" << rows << ", " << width << "], path "
                       << static_cast<int>(path) << ", norm " << static_cast<int>(kind));
          CheckNorm(emulator, GetParam(), ranks, rows, width, path, kind);
        }
      }
    }
  }
}

// Launches of all shapes and both paths, back to back, ranks as fast as they are: nobody overwrites
// what another still reads.
TEST_P(PeerSumTest, LaunchesInARowDoNotMeetInMemory) {
  constexpr int64_t kCounts[] = {5, 1104, 300};
  PeerRanks group(3);
  Sums sums;
  for (size_t i = 0; i < 24; ++i) sums.Add(group, GetParam(), kCounts[i % 3], kPaths[i / 2 % 2]);
  sums.Run(group, [](int rank, size_t i) {
    for (size_t turn = 0; turn < (i * 7 + static_cast<size_t>(rank) * 5) % 4; ++turn)
      std::this_thread::yield();
  });
  sums.Check();
}

// What is recorded once finds its launch's number in device memory each time.
TEST_P(PeerSumTest, IsReplayedOnOtherValues) {
  constexpr int kRanks = 4, kReplays = 5;
  constexpr int64_t kCount = 200;
  PeerRanks group(kRanks);
  std::vector<Tensor> data;
  std::vector<host_cuda::Recording> graphs(kRanks);
  for (int r = 0; r < kRanks; ++r) {
    data.push_back(group.cpu().Zeros(GetParam(), {kCount}));
    for (const PeerPath path : kPaths) PeerSum(&graphs[r], group.Of(r), path, data[r].view());
    ASSERT_EQ(graphs[r].size(), 2u);
  }
  for (int replay = 0; replay < kReplays; ++replay) {
    const std::vector<Tensor> parts = Parts(group, GetParam(), {kCount}, replay + 1);
    const Tensor sum = SumOf(group, parts);
    for (int r = 0; r < kRanks; ++r)
      std::memcpy(data[r].view().data, parts[r].view().data,
                  static_cast<size_t>(parts[r].view().bytes()));
    group.Run([&](int r) {
      for (const auto& node : graphs[r]) node();
    });
    // The second launch sums what all have of the first.
    std::vector<const void*> sums(kRanks, sum.view().data);
    const Tensor expected = group.cpu().Zeros(GetParam(), {kCount});
    SumInOrder(GetParam(), sums, kCount, expected.view().data);
    for (const Tensor& rank : data) ExpectSameBits(rank.view(), expected.view());
    // And a launch that is none of the graph's in between.
    const std::vector<Tensor> eager = Parts(group, GetParam(), {3}, 50 + replay);
    const Tensor eager_sum = SumOf(group, eager);
    group.Run([&](int r) { PeerSum(nullptr, group.Of(r), kPaths[0], eager[r].view()); });
    for (const Tensor& rank : eager) ExpectSameBits(rank.view(), eager_sum.view());
  }
}

INSTANTIATE_TEST_SUITE_P(Types, PeerSumTest, ::testing::ValuesIn(Types()),
                         [](const auto& info) { return std::string(Name(info.param)); });

// Rank 1 is dead.
TEST(PeerSum, AWaitForOneWhoNeverComesIsGivenUp) {
  PeerRanks group(2);
  const std::vector<Tensor> parts = Parts(group, DType::kF32, {40}, 1);
  for (const PeerPath path : kPaths) {
    std::atomic<bool> left{false};
    std::jthread rank([&] {
      PeerSum(nullptr, group.Of(0), path, parts[0].view());
      left.store(true);
    });
    if (path == PeerPath::kOneShot) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      EXPECT_FALSE(left.load());
      group.GiveUp();  // and once given up, further ones do not wait either
    }
  }
}

TEST(PeerSum, TheCutHangsOnTheShapeAlone) {
  for (const int64_t n : {1, 100, 1024, 1025, 40000, 1 << 20}) {
    for (const int ranks : {2, 3, 8}) {
      const cuda::PeerRows rows = cuda::RowsOfSum(DType::kBF16, n, ranks);
      EXPECT_GE(rows.rows * rows.width, n);
      EXPECT_LT((rows.rows - 1) * rows.width, n);
      EXPECT_LE(rows.rows, cuda::kMaxPeerBlocks);
      EXPECT_GE(rows.piece * ranks, rows.width);
      EXPECT_EQ(rows.piece % 8, 0);
      EXPECT_EQ(rows.width % 8, 0);
    }
  }
  const cuda::PeerRows rows = cuda::RowsOfNorm(DType::kBF16, 4, 100, 3);
  EXPECT_EQ(rows.piece, 40);
  EXPECT_EQ(cuda::PeerBytes(PeerPath::kOneShot, DType::kBF16, rows, 3), 2 * 3 * 400);
  EXPECT_EQ(cuda::PeerBytes(PeerPath::kTwoShot, DType::kBF16, rows, 3), 2 * (3 * 160 + 400));
}

}  // namespace
}  // namespace trireme
