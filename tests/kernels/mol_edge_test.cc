// MoL's scans where it is narrow: all sizes of batches, lists that are sorted, reversed or equal
// already, vectors of nothing.
#include "tests/kernels/mol_fixture.h"

namespace trireme {
namespace {

class MolEdgeTest : public MolOpTest {};

// The same query first, in the middle and last of a batch, and alone.
TEST_P(MolEdgeTest, ABatchOfAnySizeGivesTheSameBits) {
  const MolShape shape = Shape(2, 2, 16, 8);
  constexpr int64_t kK = 9, kItems = 40;
  const int64_t most = GetParam().host_cuda ? 33 : 512;
  const MolProblem problem(device_, shape, most, kItems, 91);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    MolTestTable table(device_, shape, storage, kItems, false);
    problem.Store(device_, table);
    MolScan scan(device_, most, kItems, table.slots());
    const MolAnswer whole = Search(problem, table, scan, kK, true);
    for (const int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 128, 512}) {
      if (batch > most) break;
      for (const int64_t first : {int64_t{0}, (most - batch) / 2, most - batch}) {
        const MolAnswer part(device_, batch, kK);
        MolSearch(stream(), *problem.gate, problem.queries(first, batch), table.view(),
                  scan.allowed(batch), true, part.view(),
                  Workspace(MolScanOp::kSearch, shape, table, batch, kK), {});
        for (int64_t i = 0; i < batch * kK; ++i) {
          ASSERT_EQ(part.keys[i], whole.keys[first * kK + i]) << "batch " << batch;
        }
      }
    }
  }
}

// Item i is the query times scale(i): the best first, last, all the same, and one among equals.
TEST_P(MolEdgeTest, ListsInAnyOrderAreSorted) {
  const MolShape shape = Shape(1, 1, 4, 8);
  constexpr int64_t kItems = 2500, kSpike = 1700;
  const MolProblem problem(device_, shape, 1, kItems, 93);
  const auto expect = [&](const char* what, auto&& scale, auto&& item_at) {
    for (int64_t i = 0; i < kItems; ++i) {
      for (int64_t k = 0; k < 4; ++k) {
        problem.item_components.view().row<float>(i)[k] =
            problem.query_components.view().row<float>(0)[k] * static_cast<float>(scale(i));
      }
    }
    MolTestTable table(device_, shape, MolStorage::kF32, kItems, false);
    problem.Store(device_, table);
    for (const int64_t k : {1, 2, 31, 32, 33, 100, 1024, 2048}) {
      for (const bool prune : {false, true}) {
        MolScan scan(device_, 1, kItems, table.slots());
        const MolAnswer answer = Search(problem, table, scan, k, prune);
        for (int64_t j = 0; j < k; ++j) {
          ASSERT_EQ(answer.slots[j], item_at(j)) << what << ", k " << k << " at " << j;
        }
      }
    }
  };
  expect(
      "ascending", [](int64_t i) { return static_cast<double>(i) / kItems; },
      [](int64_t j) { return kItems - 1 - j; });
  expect(
      "descending", [](int64_t i) { return 1 - static_cast<double>(i) / kItems; },
      [](int64_t j) { return j; });
  expect(
      "equal", [](int64_t) { return 0.5; }, [](int64_t j) { return j; });
  expect(
      "one spike", [](int64_t i) { return i == kSpike ? 1.0 : 0.5; },
      [](int64_t j) { return j == 0        ? kSpike
                             : j <= kSpike ? j - 1
                                           : j; });
}

TEST_P(MolEdgeTest, ZeroVectorsScoreZero) {
  for (const int64_t dim : {5, 16}) {
    const MolShape shape = Shape(2, 3, dim, 8);
    const MolProblem problem(device_, shape, 2, 70, 97);
    Fill(problem.item_components.view().Rows(33, 1), 0.0);
    Fill(problem.query_components.view().Rows(1, 1), 0.0);
    for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
      MolTestTable table(device_, shape, storage, problem.items, false);
      problem.Store(device_, table);
      const std::vector<float> scores = Scores(problem, table);
      EXPECT_EQ(scores[33], 0.0f);
      EXPECT_NE(scores[34], 0.0f);
      for (int64_t i = 0; i < problem.items; ++i) EXPECT_EQ(scores[problem.items + i], 0.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MolEdgeTest, ::testing::ValuesIn(DeviceCases()), MolDeviceName);

}  // namespace
}  // namespace trireme
