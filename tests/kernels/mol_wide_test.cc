// Heads with more logits than a GPU's multiprocessor has memory for: the same scores, bits and
// answers as any other.
#include "tests/kernels/mol_fixture.h"

namespace trireme {
namespace {

class MolWideTest : public MolOpTest {};

TEST_P(MolWideTest, ScoresAreTheTwins) {
  // The first is the widest that fits. Hundreds of logits of +-20 would round the gate's sums by
  // more than the tolerance.
  const MolShape shapes[] = {Shape(26, 16, 3, 8, 1.0f),
                             Shape(139, 3, 3, 8, 1.0f),
                             Shape(30, 20, 5, 9, 1.0f),
                             Shape(21, 20, 4, 0, 1.0f),
                             Diagonal(Shape(450, 450, 2, 7, 1.0f)),
                             Concat(Shape(19, 23, 3, 11, 1.0f))};
  ExpectTwins(shapes, 2, 40, 700);
}

TEST_P(MolWideTest, BitsDoNotDependOnBatchSlotOrPruning) {
  const MolShape shape = Shape(21, 20, 3, 8);
  constexpr int64_t kItems = 130, kQueries = 5, kK = 20;
  const MolProblem problem(device_, shape, kQueries, kItems, 800);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    MolTestTable table(device_, shape, storage, kItems, false);
    problem.Store(device_, table);
    MolScan scan(device_, kQueries, kItems, table.slots());
    const MolAnswer whole = Search(problem, table, scan, kK, false);
    EXPECT_TRUE(Search(problem, table, scan, kK, true) == whole);
    for (int64_t b = 0; b < kQueries; b += 2) {
      const MolAnswer one(device_, 1, kK);
      MolSearch(stream(), *problem.gate, problem.queries(b, 1), table.view(), scan.allowed(1), true,
                one.view(), Workspace(MolScanOp::kSearch, shape, table, 1, kK), {});
      for (int64_t i = 0; i < kK; ++i) ASSERT_EQ(one.keys[i], whole.keys[b * kK + i]);
    }
    // The same items in other lanes, with other neighbours.
    MolTestTable reversed(device_, shape, storage, kItems, false);
    std::vector<int32_t> slots(kItems);
    for (int64_t i = 0; i < kItems; ++i) {
      slots[i] = static_cast<int32_t>(kItems - 1 - i);
      reversed.order()[kItems - 1 - i] = static_cast<uint32_t>(i);
    }
    MolStore(stream(), shape, problem.item_components.view(), problem.item_gates.view(),
             device_.From(slots).view(), reversed.view());
    EXPECT_TRUE(Search(problem, reversed, scan, kK, true).SameKeys(whole));
    // All items as candidates.
    std::vector<int32_t> begin, all;
    for (int64_t b = 0; b <= kQueries; ++b) begin.push_back(static_cast<int32_t>(b * kItems));
    for (int64_t i = 0; i < kQueries * kItems; ++i) all.push_back(static_cast<int32_t>(i % kItems));
    const MolAnswer rescored(device_, kQueries, kK);
    MolRescore(stream(), *problem.gate, problem.queries(), table.view(), device_.From(begin).view(),
               device_.From(all).view(), rescored.view(),
               Workspace(MolScanOp::kRescore, shape, table, kQueries, kK, kQueries * kItems), {});
    EXPECT_TRUE(rescored == whole);
  }
}

// All logits of an item are the same and so are all weights: its score is that value but for
// rounding, which lifts all of these items by more than what tells them apart, since each term
// beyond the 2048th is rounded up to 1 + 2^-12. The best one is also where it is scored late.
TEST_P(MolWideTest, WhatRoundingLiftsAboveItsLogitsIsNotPruned) {
  const MolShape shape = Shape(64, 64, 1, 0, 1.0f);
  // The emulator takes its time, and so do sanitizers.
  const int64_t items = (GetParam().host_cuda ? 24 : 96) / (kSanitizer ? 3 : 1);
  MolProblem problem(device_, shape, 1, items, 850);
  Fill(problem.query_components.view(), 1.0);
  for (const Tensor* zero : {&problem.query_gates, &problem.item_gates, &problem.w2, &problem.b2})
    Fill(zero->view(), 0.0);
  problem.gate =
      PackMolGate(stream(), shape, {.w2 = problem.w2.view(), .b2 = problem.b2.view()}).value();
  std::vector<int64_t> place(items);  // of value i
  for (int64_t i = 0; i < items; ++i) place[i] = i;
  const auto store = [&](MolTestTable& table) {
    for (int64_t i = 0; i < items; ++i) {
      const float share = static_cast<float>(i) / static_cast<float>(items - 1);
      const float value = 1.0f + (0.757f + 0.0404f * share) * 0x1p-12f;
      std::fill_n(problem.item_components.view().row<float>(place[i]), shape.item_components,
                  value);
    }
    problem.Store(device_, table);
  };
  MolTestTable table(device_, shape, MolStorage::kF32, items, false);
  store(table);
  MolScan scan(device_, 1, items, table.slots());
  const MolAnswer all = Search(problem, table, scan, items, false);
  const std::vector<int32_t> ranking(all.slots.begin(), all.slots.end());
  for (const int64_t best : {items - 1, items / 2, int64_t{0}}) {
    for (int64_t j = 0; j < items; ++j) place[ranking[j]] = (best + items - j) % items;
    store(table);
    const MolAnswer exact = Search(problem, table, scan, 1, false);
    if (!GetParam().gpu()) {  // which adds up in another order
      EXPECT_GT(MolKeyScore(exact.keys[0]), (1.0f + 0.8f * 0x1p-12f) * (1.0f + 2e-5f));
    }
    EXPECT_TRUE(Search(problem, table, scan, 1, true) == exact);
  }
}

TEST_P(MolWideTest, ListsOfEachLogitAreTheSortedDots) {
  const MolShape shape = Shape(21, 20, 4, 8);
  constexpr int64_t kItems = 70, kK = 5;
  const MolProblem problem(device_, shape, 2, kItems, 900);
  MolTestTable table(device_, shape, MolStorage::kF32, kItems, false);
  problem.Store(device_, table);
  MolScan scan(device_, 2, kItems, table.slots());
  const int64_t logits = shape.logits();
  const MolAnswer found(device_, 2 * logits, kK);
  MolLogitTopK(stream(), shape, problem.queries(), table.view(), scan.allowed(2), found.view(),
               Workspace(MolScanOp::kLogits, shape, table, 2, kK), {});
  const std::vector<double> expected = problem.Expected().logits;  // [2, kItems, L]
  for (int64_t list = 0; list < 2 * logits; ++list) {
    std::vector<double> best;
    for (int64_t i = 0; i < kItems; ++i) {
      best.push_back(expected[(list / logits * kItems + i) * logits + list % logits]);
    }
    std::sort(best.rbegin(), best.rend());
    for (int64_t j = 0; j < kK; ++j) {
      ASSERT_NEAR(MolKeyScore(found.keys[list * kK + j]), best[j], kMolTolerance);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MolWideTest, ::testing::ValuesIn(DeviceCases()), MolDeviceName);

}  // namespace
}  // namespace trireme
