// The MoL ops against their double-precision twin, and their promise: a pair's score has the same
// bits in any batch, tile, slot and number of threads, pruned or not.
#include <cmath>

#include "tests/kernels/mol_fixture.h"

namespace trireme {
namespace {

class MolTest : public MolOpTest {};

TEST_P(MolTest, ScoresAreTheTwins) {
  const MolShape shapes[] = {Shape(8, 4, 64, 128),
                             Shape(8, 8, 32, 128),
                             Shape(2, 2, 8, 8),
                             Shape(1, 1, 1, 1),
                             Shape(7, 3, 5, 13),
                             Shape(13, 2, 17, 9, 1.0f),
                             Shape(3, 3, 16, 0),
                             Diagonal(Shape(5, 5, 12, 20)),
                             Diagonal(Shape(11, 11, 6, 7)),
                             Diagonal(Concat(Shape(4, 4, 8, 128, 1.0f))),
                             Concat(Shape(3, 2, 9, 11, 1.0f))};
  ExpectTwins(shapes, 3, 75, 100);
}

TEST_P(MolTest, StoredTypesRoundAndNothingElse) {
  const MolShape shape = Shape(4, 2, 24, 16);
  for (const MolStorage storage : {MolStorage::kBF16, MolStorage::kInt8}) {
    const MolProblem problem(device_, shape, 2, 70, 7);
    MolTestTable table(device_, shape, storage, problem.items, false);
    problem.Store(device_, table);
    const std::vector<double> expected = problem.Expected().scores;
    const std::vector<float> scores = Scores(problem, table);
    double squares = 0;
    for (size_t i = 0; i < scores.size(); ++i) squares += std::pow(scores[i] - expected[i], 2);
    // Logits of +-20 from vectors with 2^-9 (bf16) or at most 1/254 of the largest element (int8)
    // of error an element, averaged over 24 elements: about 20 * 2^-9 / 5 and twice that.
    EXPECT_LT(std::sqrt(squares / scores.size()), storage == MolStorage::kBF16 ? 0.03 : 0.06);
    EXPECT_GT(squares, 0.0);
  }
}

double Bf16(double x) { return ToFloat(FromFloat<BF16>(static_cast<float>(x))); }

// A head's scores in doubles with the roundings of the tensor-core kernels: queries, items, gates,
// weights, and what enters each layer of the cross gate, in bf16.
std::vector<double> RoundedScores(const MolProblem& problem) {
  const MolShape& shape = problem.shape;
  const int64_t px = shape.item_components, d = shape.component_dim, h = shape.cross_hidden;
  const int64_t logits = shape.logits();
  const auto values = [](const Tensor& tensor) { return ToDoubles(tensor.view()); };
  const std::vector<double> q = values(problem.query_components),
                            x = values(problem.item_components);
  const std::vector<double> gq = values(problem.query_gates), gi = values(problem.item_gates);
  const std::vector<double> w1 = values(problem.w1), b1 = values(problem.b1);
  const std::vector<double> w2 = values(problem.w2), b2 = values(problem.b2);
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  std::vector<double> scores;
  std::vector<double> s(logits), hidden(h), w(logits);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < problem.items; ++i) {
      for (int64_t l = 0; l < logits; ++l) {
        s[l] = 0;
        for (int64_t k = 0; k < d; ++k) {
          s[l] += Bf16(q[(b * shape.query_components + l / px) * d + k]) *
                  Bf16(x[(i * px + l % px) * d + k]);
        }
        s[l] /= shape.temperature;
      }
      for (int64_t u = 0; u < h; ++u) {
        double sum = b1[u];
        for (int64_t l = 0; l < logits; ++l) sum += Bf16(w1[u * logits + l]) * Bf16(s[l]);
        hidden[u] = Bf16(silu(sum));
      }
      double total = 0, score = 0;
      for (int64_t l = 0; l < logits; ++l) {
        double sum = b2[l];
        for (int64_t u = 0; u < h; ++u) sum += Bf16(w2[l * h + u]) * hidden[u];
        w[l] = silu(gq[b * logits + l] * Bf16(gi[i * logits + l]) + sum);
      }
      const double top = *std::max_element(w.begin(), w.end());
      for (int64_t l = 0; l < logits; ++l) {
        total += std::exp(w[l] - top);
        score += std::exp(w[l] - top) * s[l];
      }
      scores.push_back(score / total);
    }
  }
  return scores;
}

TEST_P(MolTest, TensorCoresRoundToBf16AndNothingElse) {
  if (!GetParam().gpu()) GTEST_SKIP() << "the CPU scores in f32";
  const MolShape shapes[] = {Shape(8, 4, 64, 128), Shape(8, 8, 32, 128), Shape(3, 2, 16, 33),
                             Shape(10, 2, 32, 40), Shape(9, 4, 16, 20)};
  uint64_t seed = 200;
  for (const MolShape& shape : shapes) {
    const MolProblem problem(device_, shape, 3, 75, seed += 10);
    MolTestTable table(device_, shape, MolStorage::kBF16, problem.items, false);
    problem.Store(device_, table);
    const std::vector<double> expected = RoundedScores(problem);
    const std::vector<float> scores = Scores(problem, table);
    double squares = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
      // A sum that lies between two bf16 numbers may go to either: 2^-8 of a hidden unit or logit
      // once in a while, and tanh is good to 2^-11.
      ASSERT_NEAR(scores[i], expected[i], 0.05) << "pair " << i;
      squares += std::pow(scores[i] - expected[i], 2);
    }
    EXPECT_LT(std::sqrt(squares / static_cast<double>(scores.size())), 2e-3)
        << shape.query_components << "x" << shape.item_components << "x" << shape.component_dim;
  }
}

TEST_P(MolTest, TopKIsTheSortedScores) {
  const MolShape shape = Shape(3, 2, 8, 8);
  const MolProblem problem(device_, shape, 4, 1500, 11);
  MolTestTable table(device_, shape, MolStorage::kF32, problem.items, false);
  problem.Store(device_, table);
  const std::vector<float> scores = Scores(problem, table);
  for (const int64_t k : {1, 2, 31, 32, 33, 100, 1024, 1500, 2048}) {
    for (const bool prune : {false, true}) {
      MolScan scan(device_, problem.batch, problem.items, table.slots());
      const MolAnswer answer = Search(problem, table, scan, k, prune);
      for (int64_t b = 0; b < problem.batch; ++b) {
        const reference::Doubles row(scores.begin() + b * problem.items,
                                     scores.begin() + (b + 1) * problem.items);
        const std::vector<int64_t> expected = reference::TopK(row, k);
        for (int64_t j = 0; j < k; ++j) {
          const bool there = j < static_cast<int64_t>(expected.size());
          ASSERT_EQ(answer.slots[b * k + j], there ? expected[j] : -1) << "k " << k << " at " << j;
          if (there) {
            ASSERT_EQ(MolKeyScore(answer.keys[b * k + j]), static_cast<float>(row[expected[j]]));
          }
        }
      }
    }
  }
}

TEST_P(MolTest, TiesGoToTheSmallerPlaceInTheOrder) {
  const MolShape shape = Shape(2, 2, 8, 8);
  const MolProblem problem(device_, shape, 2, 200, 13);
  // Every item is item 0.
  for (int64_t i = 1; i < problem.items; ++i) {
    stream().Copy(problem.item_components.view().row<float>(i), problem.item_components.view().data,
                  2 * 8 * sizeof(float));
    stream().Copy(problem.item_gates.view().row<float>(i), problem.item_gates.view().data,
                  4 * sizeof(float));
  }
  MolTestTable table(device_, shape, MolStorage::kF32, problem.items, false);
  problem.Store(device_, table);
  for (int64_t i = 0; i < problem.items; ++i) table.order()[i] = static_cast<uint32_t>(199 - i);
  for (const bool prune : {false, true}) {
    MolScan scan(device_, problem.batch, problem.items, table.slots());
    const MolAnswer answer = Search(problem, table, scan, 50, prune);
    for (int64_t j = 0; j < 50; ++j) {
      EXPECT_EQ(answer.slots[j], 199 - j);
      EXPECT_EQ(answer.slots[50 + j], 199 - j);
    }
  }
}

TEST_P(MolTest, BitsDoNotDependOnBatchThreadsSlotOrPruning) {
  const MolShape shape = Shape(8, 4, 16, 24);
  constexpr int64_t kK = 40;
  // Fewer in the emulator, which is slow.
  const bool few = GetParam().host_cuda;
  const int64_t all_items = few ? 130 : 450, all_queries = few ? 12 : 40;
  const MolProblem problem(device_, shape, all_queries, all_items, 17);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    MolTestTable table(device_, shape, storage, all_items, false);
    problem.Store(device_, table);
    MolScan scan(device_, all_queries, all_items, table.slots());
    MolScanCounts all, pruned;
    const MolAnswer whole = Search(problem, table, scan, kK, false, &all);
    EXPECT_TRUE(Search(problem, table, scan, kK, true, &pruned) == whole);
    EXPECT_EQ(all.pairs, all_queries * all_items);
    EXPECT_EQ(all.gated, all_queries * all_items);
    EXPECT_LE(pruned.gated, all.gated);
    const std::vector<int64_t> batches =
        few ? std::vector<int64_t>{1, 3, 9} : std::vector<int64_t>{1, 2, 3, 9, 33};
    for (const int64_t batch : batches) {
      for (const int64_t first : {int64_t{0}, (all_queries - batch) / 2, all_queries - batch}) {
        MolAnswer part(device_, batch, kK);
        MolSearch(stream(), *problem.gate, problem.queries(first, batch), table.view(),
                  scan.allowed(batch), true, part.view(),
                  Workspace(MolScanOp::kSearch, shape, table, batch, kK), {});
        for (int64_t i = 0; i < batch * kK; ++i) {
          ASSERT_EQ(part.keys[i], whole.keys[first * kK + i]) << "batch " << batch;
        }
      }
    }
    // The same items elsewhere: reversed, so that each has other neighbours and another lane.
    MolTestTable reversed(device_, shape, storage, all_items, false);
    std::vector<int32_t> slots(all_items);
    for (int64_t i = 0; i < all_items; ++i) {
      slots[i] = static_cast<int32_t>(all_items - 1 - i);
      reversed.order()[all_items - 1 - i] = static_cast<uint32_t>(i);
    }
    MolStore(stream(), shape, problem.item_components.view(), problem.item_gates.view(),
             device_.From(slots).view(), reversed.view());
    EXPECT_TRUE(Search(problem, reversed, scan, kK, true).SameKeys(whole));
    DeviceCase three_threads = GetParam();
    three_threads.threads = 3;
    const TestDevice three(three_threads);
    MolAnswer other(device_, all_queries, kK);
    MolSearch(three.stream(), *problem.gate, problem.queries(), table.view(),
              scan.allowed(all_queries), true, other.view(),
              Workspace(MolScanOp::kSearch, shape, table, all_queries, kK), {});
    EXPECT_TRUE(other == whole);
  }
}

TEST_P(MolTest, PruningSkipsTheGate) {
  // Components of 4 go to the lanes of a GPU, those of 16 to its tensor cores.
  for (const int64_t dim : {4, 16}) {
    const MolShape shape = Shape(2, 2, dim, 8);
    const MolProblem problem(device_, shape, 1, 4000, 53);
    for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
      MolTestTable table(device_, shape, storage, problem.items, false);
      problem.Store(device_, table);
      MolScan scan(device_, 1, problem.items, table.slots());
      MolScanCounts counts;
      const MolAnswer pruned = Search(problem, table, scan, 10, true, &counts);
      EXPECT_EQ(counts.pairs, 4000);
      EXPECT_LT(counts.gated, 3600);
      EXPECT_TRUE(pruned == Search(problem, table, scan, 10, false));
    }
  }
}

TEST_P(MolTest, ForbiddenAndExcludedSlotsAreNotAnswered) {
  const MolShape shape = Shape(3, 2, 8, 8);
  const MolProblem problem(device_, shape, 3, 500, 19);
  MolTestTable table(device_, shape, MolStorage::kF32, problem.items, false);
  problem.Store(device_, table);
  const std::vector<float> scores = Scores(problem, table);
  for (const double pass : {0.0, 0.002, 0.1, 0.5, 0.9, 1.0}) {
    MolScan scan(device_, problem.batch, problem.items, table.slots());
    std::vector<bool> allowed(problem.items);
    for (int64_t i = 0; i < problem.items; ++i) {
      allowed[i] = (RandomValue(23, i) + 1) / 2 < pass;
      if (!allowed[i]) scan.Forbid(i);
    }
    scan.excluded_begin = {0, 2, 2, 5};
    scan.excluded = {3, 499, 0, 31, 32};
    for (const bool prune : {false, true}) {
      const MolAnswer answer = Search(problem, table, scan, 60, prune);
      for (int64_t b = 0; b < problem.batch; ++b) {
        reference::Doubles row(problem.items, -INFINITY);
        for (int64_t i = 0; i < problem.items; ++i) {
          if (allowed[i]) row[i] = scores[b * problem.items + i];
        }
        for (int32_t e = scan.excluded_begin[b]; e < scan.excluded_begin[b + 1]; ++e) {
          row[scan.excluded[e]] = -INFINITY;
        }
        const std::vector<int64_t> expected = reference::TopK(row, 60);
        for (int64_t j = 0; j < 60; ++j) {
          ASSERT_EQ(answer.slots[b * 60 + j],
                    j < static_cast<int64_t>(expected.size()) ? expected[j] : -1);
        }
      }
    }
  }
}

TEST_P(MolTest, FirstStagesAreTheSortedDots) {
  const MolShape shape = Shape(4, 3, 20, 8);
  const MolProblem problem(device_, shape, 3, 400, 29);
  const reference::MolResult expected = problem.Expected();
  const int64_t logits = shape.logits(), items = problem.items;
  for (const bool means : {false, true}) {
    MolTestTable table(device_, shape, MolStorage::kF32, items, means);
    problem.Store(device_, table);
    MolScan scan(device_, problem.batch, items, table.slots());
    const MolAnswer average(device_, problem.batch, 300), each(device_, problem.batch * logits, 25);
    MolAverageTopK(stream(), shape, problem.queries(), table.view(), scan.allowed(problem.batch),
                   average.view(), Workspace(MolScanOp::kAverage, shape, table, problem.batch, 300),
                   {});
    MolLogitTopK(stream(), shape, problem.queries(), table.view(), scan.allowed(problem.batch),
                 each.view(), Workspace(MolScanOp::kLogits, shape, table, problem.batch, 25), {});
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t j = 0; j < 300; ++j) {
        const int32_t slot = average.slots[b * 300 + j];
        double mean = 0;
        for (int64_t l = 0; l < logits; ++l) {
          mean += expected.logits[(b * items + slot) * logits + l] * shape.temperature / logits;
        }
        ASSERT_NEAR(MolKeyScore(average.keys[b * 300 + j]), mean, 1e-6);
        ASSERT_TRUE(j == 0 || average.keys[b * 300 + j - 1] > average.keys[b * 300 + j]);
      }
      for (int64_t l = 0; l < logits; ++l) {
        reference::Doubles row;
        for (int64_t i = 0; i < items; ++i) {
          row.push_back(expected.logits[(b * items + i) * logits + l]);
        }
        const std::vector<int64_t> best = reference::TopK(row, 25);
        for (int64_t j = 0; j < 25; ++j) {
          const int64_t at = (b * logits + l) * 25 + j;
          ASSERT_NEAR(MolKeyScore(each.keys[at]), row[best[j]], kMolTolerance);
        }
      }
    }
  }
}

// Lists longer than a pass of any sort, filled best last: every item is better than all before it.
TEST_P(MolTest, LongListsOfAscendingScoresAreSorted) {
  const MolShape shape = Shape(1, 1, 4, 8);
  constexpr int64_t kItems = 9000;
  const MolProblem problem(device_, shape, 2, kItems, 61);
  for (int64_t i = 0; i < kItems; ++i) {
    for (int64_t k = 0; k < 4; ++k) {
      problem.item_components.view().row<float>(i)[k] =
          problem.query_components.view().row<float>(0)[k] * static_cast<float>(i) / kItems;
    }
  }
  MolTestTable table(device_, shape, MolStorage::kF32, kItems, false);
  problem.Store(device_, table);
  for (const int64_t k : {1, 700, 2048, 2049, 5000, 8999, 12000}) {
    MolScan scan(device_, 2, kItems, table.slots());
    const MolAnswer answer(device_, 2, k);
    MolAverageTopK(stream(), shape, problem.queries(), table.view(), scan.allowed(2), answer.view(),
                   Workspace(MolScanOp::kAverage, shape, table, 2, k), {});
    for (int64_t j = 0; j < k; ++j) {
      ASSERT_EQ(answer.slots[j], j < kItems ? kItems - 1 - j : -1) << "k " << k;
      if (j == 0) continue;
      const uint64_t before = answer.keys[k + j - 1], key = answer.keys[k + j];
      ASSERT_TRUE(before > key || (j >= kItems && key == 0)) << "k " << k << " at " << j;
    }
  }
}

// Callers reserve for the most they may ask for. Here every size is asked for with its neighbour.
TEST_P(MolTest, AWorkspaceForMoreItemsSufficesForFewer) {
  for (const MolShape& shape : {Shape(8, 4, 16, 24), Shape(3, 2, 5, 4), Shape(21, 20, 4, 8)}) {
    for (const MolScanOp op :
         {MolScanOp::kSearch, MolScanOp::kAverage, MolScanOp::kLogits, MolScanOp::kRescore}) {
      for (const MolStorage storage : {MolStorage::kF32, MolStorage::kInt8}) {
        int64_t before = 0;
        for (const int64_t items : {0, 1, 31, 32, 33, 1000, 1 << 20, (1 << 23) + 5, 1 << 27}) {
          const int64_t bytes =
              MolWorkspaceBytes(stream(), shape, {op, storage, /*batch=*/7, items, /*k=*/2500});
          EXPECT_GE(bytes, before);
          before = bytes;
        }
        EXPECT_EQ(before > 0, GetParam().gpu()) << "the CPU works in host memory";
      }
    }
  }
}

TEST_P(MolTest, AWorkspaceThatIsTooSmallIsRefused) {
  if (!GetParam().gpu()) GTEST_SKIP() << "the CPU works in host memory";
  const MolShape shape = Shape(2, 2, 8, 8);
  const MolProblem problem(device_, shape, 2, 40, 71);
  MolTestTable table(device_, shape, MolStorage::kF32, problem.items, false);
  problem.Store(device_, table);
  MolScan scan(device_, 2, problem.items, table.slots());
  const MolAnswer answer(device_, 2, 3);
  const TensorView enough = Workspace(MolScanOp::kSearch, shape, table, 2, 3);
  const TensorView small = enough.Rows(0, enough.bytes() - 1);
  EXPECT_DEATH(MolSearch(stream(), *problem.gate, problem.queries(), table.view(), scan.allowed(2),
                         true, answer.view(), small, {}),
               "the workspace has [0-9]+ bytes, needs ");
}

TEST_P(MolTest, AnEmptyTableAnswersNothing) {
  const MolShape shape = Shape(2, 2, 8, 8);
  const MolProblem problem(device_, shape, 2, 1, 67);
  MolTestTable table(device_, shape, MolStorage::kF32, 0, false);
  MolScan scan(device_, 2, 0, 0);
  MolScanCounts counts;
  const MolAnswer answer = Search(problem, table, scan, 3, true, &counts);
  for (int64_t j = 0; j < 6; ++j) {
    EXPECT_EQ(answer.keys[j], 0u);
    EXPECT_EQ(answer.slots[j], -1);
  }
  EXPECT_EQ(counts.pairs, 0);
}

TEST_P(MolTest, RescoringCandidatesGivesTheScansBits) {
  const MolShape shape = Shape(8, 4, 16, 24);
  const MolProblem problem(device_, shape, 5, 1000, 31);
  std::vector<int32_t> begin = {0}, slots;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < problem.items; ++i) {
      if (b != 2 && RandomValue(37 + b, i) < 0.2 * b - 0.8) slots.push_back(int32_t(i));
    }
    begin.push_back(static_cast<int32_t>(slots.size()));
  }
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    MolTestTable table(device_, shape, storage, problem.items, false);
    problem.Store(device_, table);
    const std::vector<float> scores = Scores(problem, table);
    const MolAnswer answer(device_, problem.batch, 30);
    MolRescore(stream(), *problem.gate, problem.queries(), table.view(), device_.From(begin).view(),
               device_.From(slots).view(), answer.view(),
               Workspace(MolScanOp::kRescore, shape, table, problem.batch, 30,
                         static_cast<int64_t>(slots.size())),
               {});
    for (int64_t b = 0; b < problem.batch; ++b) {
      reference::Doubles row(problem.items, -INFINITY);
      for (int32_t c = begin[b]; c < begin[b + 1]; ++c) {
        row[slots[c]] = scores[b * problem.items + slots[c]];
      }
      const std::vector<int64_t> expected = reference::TopK(row, 30);
      for (int64_t j = 0; j < 30; ++j) {
        const bool there = j < static_cast<int64_t>(expected.size());
        ASSERT_EQ(answer.slots[b * 30 + j], there ? expected[j] : -1) << b << ", " << j;
        if (there) {
          ASSERT_EQ(MolKeyScore(answer.keys[b * 30 + j]), float(row[expected[j]]));
        }
      }
    }
  }
}

TEST_P(MolTest, NotFiniteScoresAreCountedAndNeverAnswered) {
  const MolShape shape = Shape(2, 2, 8, 8);
  const MolProblem problem(device_, shape, 2, 100, 41);
  problem.item_components.view().row<float>(40)[3] = NAN;
  problem.item_components.view().row<float>(41)[0] = INFINITY;
  problem.item_gates.view().row<float>(42)[1] = NAN;
  MolTestTable table(device_, shape, MolStorage::kF32, problem.items, false);
  problem.Store(device_, table);
  MolScan scan(device_, problem.batch, problem.items, table.slots());
  MolScanCounts counts;
  const MolAnswer answer = Search(problem, table, scan, 100, false, &counts);
  EXPECT_EQ(counts.not_finite, 2 * 3);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t j = 0; j < 100; ++j) {
      const int32_t slot = answer.slots[b * 100 + j];
      EXPECT_TRUE(j < 97 ? (slot >= 0 && (slot < 40 || slot > 42)) : slot == -1);
    }
  }
}

TEST_P(MolTest, ActivationsAndNorms) {
  const Tensor x = device_.Random(DType::kF32, {5, 54}, 43, 6.0);
  const std::vector<double> in = ToDoubles(x.view());
  const Tensor out = device_.Zeros(DType::kF32, {5, 27});
  GeluAndMul(stream(), x.view(), out.view());
  const std::vector<double> gelu = ToDoubles(out.view());
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 0; i < 27; ++i) {
      const double a = in[t * 54 + i], b = in[t * 54 + 27 + i];
      ASSERT_NEAR(gelu[t * 27 + i], 0.5 * a * (1 + std::erf(a / std::sqrt(2.0))) * b, 2e-6 * 36);
    }
  }
  Silu(stream(), x.view());
  const std::vector<double> silu = ToDoubles(x.view());
  for (size_t i = 0; i < in.size(); ++i) {
    ASSERT_NEAR(silu[i], in[i] / (1 + std::exp(-in[i])), 1e-6 * 6);
  }
  const Tensor vectors = device_.Random(DType::kF32, {4, 3 * 18}, 47);
  Fill(vectors.view().Rows(2, 1), 0.0);
  // Whose squares are too large for f32 has no direction left, and says so.
  const Tensor huge = device_.Random(DType::kF32, {1, 18}, 48);
  Fill(huge.view(), 1e19);
  L2Normalize(stream(), huge.view(), 18, 1e-6f);
  for (const double value : ToDoubles(huge.view())) EXPECT_TRUE(std::isnan(value));
  const std::vector<double> raw = ToDoubles(vectors.view());
  L2Normalize(stream(), vectors.view(), 18, 1e-6f);
  const std::vector<double> unit = ToDoubles(vectors.view());
  for (size_t v = 0; v < raw.size(); v += 18) {
    double squares = 0;
    for (size_t k = 0; k < 18; ++k) squares += raw[v + k] * raw[v + k];
    for (size_t k = 0; k < 18; ++k) {
      ASSERT_NEAR(unit[v + k], raw[v + k] / std::max(std::sqrt(squares), 1e-6), 3e-7);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MolTest, ::testing::ValuesIn(DeviceCases()), MolDeviceName);

}  // namespace
}  // namespace trireme
