// The first stage by the mean on tables of every storage, and what lies between the stages: where
// the lists of all ranks end, and the candidates of the second.
#include <functional>
#include <set>

#include "tests/kernels/mol_fixture.h"

namespace trireme {
namespace {

class MolStagesTest : public MolOpTest {
 protected:
  // Distinct keys, none of them 0.
  static uint64_t KeyAt(uint64_t seed, int64_t i) {
    return uint64_t{0x80000000u + static_cast<uint32_t>((RandomValue(seed, i) + 1) * 1e9)} << 32 |
           static_cast<uint32_t>(i + 1);
  }
  Tensor Keys(const std::vector<uint64_t>& keys, int64_t lists) {
    Tensor tensor = device_.Zeros(DType::kI64, {lists, static_cast<int64_t>(keys.size()) / lists});
    stream().Copy(tensor.view().data, keys.data(), keys.size() * sizeof(uint64_t));
    return tensor;
  }
  // Lists of `there` keys each, descending, of the k they have room for.
  static std::vector<uint64_t> SortedLists(int64_t lists, int64_t there, int64_t k, uint64_t seed) {
    std::vector<uint64_t> all;
    for (int64_t list = 0; list < lists; ++list) {
      std::vector<uint64_t> keys;
      for (int64_t j = 0; j < there; ++j) keys.push_back(KeyAt(seed, list * k + j));
      std::sort(keys.begin(), keys.end(), std::greater<>());
      keys.resize(k);
      all.insert(all.end(), keys.begin(), keys.end());
    }
    return all;
  }
};

TEST_P(MolStagesTest, LastKeysAreTheKthOfAllRanks) {
  for (const int64_t ranks : {1, 2, 5}) {
    for (const int64_t k : {1, 7, 300}) {
      for (const int64_t there : {int64_t{0}, k / 3, k}) {
        constexpr int64_t kLists = 3;
        const std::vector<uint64_t> keys = SortedLists(ranks * kLists, there, k, 5 + k);
        const Tensor on_device = Keys(keys, ranks * kLists);
        const Tensor last = device_.Zeros(DType::kI64, {kLists});
        MolLastKeys(stream(), on_device.view(), last.view());
        for (int64_t list = 0; list < kLists; ++list) {
          std::vector<uint64_t> all;
          for (int64_t r = 0; r < ranks; ++r) {
            const auto from = keys.begin() + (r * kLists + list) * k;
            all.insert(all.end(), from, from + k);
          }
          std::sort(all.begin(), all.end(), std::greater<>());
          ASSERT_EQ(last.view().as<uint64_t>()[list], all[k - 1])
              << ranks << " ranks, k " << k << ", " << there << " there";
        }
      }
    }
  }
}

// Slots of a list that lie anywhere in the table, some of them on several lists of a query.
TEST_P(MolStagesTest, CandidatesAreTheSortedUnionOfTheLists) {
  constexpr int64_t kBatch = 3;
  for (const int64_t slots : {0, 32, 4096, 300'000}) {
    std::vector<std::set<int32_t>> expected(kBatch);
    std::vector<Tensor> tensors;
    std::vector<MolStage> stages;
    int64_t room = 0;
    for (const auto& [lists, k] : {std::pair<int64_t, int64_t>{1, 70}, {4, 25}}) {
      const int64_t there = slots == 0 ? 0 : std::min(slots, k - 5);
      const std::vector<uint64_t> keys = SortedLists(kBatch * lists, there, k, 9 + lists);
      std::vector<int32_t> on_lists(keys.size(), -1);
      std::vector<uint64_t> last(kBatch * lists);
      for (int64_t list = 0; list < kBatch * lists; ++list) {
        // Query 1 has all of its lists, the others a part.
        const int64_t kept = list / lists == 1 ? there : there / 2;
        last[list] = kept == there ? 0 : keys[list * k + kept - 1];
        std::set<int32_t> distinct;
        for (int64_t j = 0; j < there; ++j) {
          int64_t slot = static_cast<int64_t>((RandomValue(31 + lists, list * k + j) + 1) / 2 *
                                              static_cast<double>(slots - 1));
          while (!distinct.insert(static_cast<int32_t>(slot)).second) slot = (slot + 1) % slots;
          on_lists[list * k + j] = static_cast<int32_t>(slot);
          if (j < kept) expected[list / lists].insert(static_cast<int32_t>(slot));
        }
      }
      tensors.push_back(Keys(keys, kBatch * lists));
      const TensorView key_view = tensors.back().view();
      tensors.push_back(device_.From(on_lists));
      const TensorView slot_view(tensors.back().view().data, DType::kI32, {kBatch * lists, k});
      tensors.push_back(Keys(last, kBatch * lists));
      stages.push_back(
          {{key_view, slot_view},
           ConstTensorView(tensors.back().view().data, DType::kI64, {kBatch * lists})});
      room += kBatch * std::min(slots, lists * k);
    }
    const Tensor begin = device_.Zeros(DType::kI32, {kBatch + 1});
    const Tensor found = device_.Zeros(DType::kI32, {room});
    const int64_t bytes =
        MolWorkspaceBytes(stream(), Shape(1, 1, 1, 1),
                          {.op = MolScanOp::kCandidates, .batch = kBatch, .items = slots});
    const Tensor workspace = device_.Zeros(DType::kU8, {bytes});
    std::fill_n(workspace.view().as<unsigned char>(), bytes, 0xff);
    MolCandidates(stream(), stages, slots, begin.view(), found.view(), workspace.view());
    const int32_t* begins = begin.view().as<int32_t>();
    EXPECT_EQ(begins[0], 0);
    for (int64_t b = 0; b < kBatch; ++b) {
      const int32_t* all = found.view().as<int32_t>();
      ASSERT_EQ(std::vector<int32_t>(all + begins[b], all + begins[b + 1]),
                std::vector<int32_t>(expected[b].begin(), expected[b].end()))
          << slots << " slots, query " << b;
    }
  }
}

// Room for candidates is more than there are: what lies behind the last is nobody's.
TEST_P(MolStagesTest, RescoringReadsNoFurtherThanTheLastRange) {
  // Components of 5 go to the lanes of a GPU, those of 16 to its tensor cores.
  for (const int64_t dim : {5, 16}) {
    const MolShape shape = Shape(3, 2, dim, 8);
    const MolProblem problem(device_, shape, 3, 900, 37);
    std::vector<int32_t> begin = {0}, slots;
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t i = b; i < problem.items && b != 1; i += 7 + b) {
        slots.push_back(static_cast<int32_t>(i));
      }
      begin.push_back(static_cast<int32_t>(slots.size()));
    }
    for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
      MolTestTable table(device_, shape, storage, problem.items, false);
      problem.Store(device_, table);
      const auto rescore = [&](const std::vector<int32_t>& candidates, const MolAnswer& answer) {
        MolRescore(stream(), *problem.gate, problem.queries(), table.view(),
                   device_.From(begin).view(), device_.From(candidates).view(), answer.view(),
                   Workspace(MolScanOp::kRescore, shape, table, problem.batch, 20,
                             static_cast<int64_t>(candidates.size())),
                   {});
      };
      const MolAnswer tight(device_, problem.batch, 20), roomy(device_, problem.batch, 20);
      rescore(slots, tight);
      std::vector<int32_t> more = slots;
      more.resize(slots.size() + 5000, INT32_MAX);
      rescore(more, roomy);
      EXPECT_TRUE(roomy == tight) << "dim " << dim;
      EXPECT_EQ(tight.keys[20], 0u) << "query 1 has no candidates";
    }
  }
}

double Bf16(double x) { return ToFloat(FromFloat<BF16>(static_cast<float>(x))); }

// Queries are not rounded, whatever the table is stored as: with items that bf16 holds as they are
// the dot products are those of f32.
TEST_P(MolStagesTest, MeansOfRoundedTablesAreComparedInF32) {
  for (const int64_t dim : {16, 64, 20}) {
    const MolShape shape = Shape(5, 3, dim, 8);
    const MolProblem problem(device_, shape, 11, 150, 83);
    const std::vector<double> q = ToDoubles(problem.query_components.view()),
                              x = ToDoubles(problem.item_components.view());
    const auto mean = [&](const std::vector<double>& from, int64_t row, int64_t count, int64_t k,
                          bool rounded) {
      double sum = 0;
      for (int64_t m = 0; m < count; ++m) {
        const double value = from[(row * count + m) * dim + k];
        sum += rounded ? Bf16(value) : value;
      }
      return sum / static_cast<double>(count);
    };
    for (const MolStorage storage : {MolStorage::kBF16, MolStorage::kInt8}) {
      for (const bool means : {false, true}) {
        MolTestTable table(device_, shape, storage, problem.items, means);
        problem.Store(device_, table);
        MolScan scan(device_, problem.batch, problem.items, table.slots());
        scan.Forbid(33);
        const auto search = [&](int64_t first, int64_t batch, const MolAnswer& answer) {
          MolAverageTopK(stream(), shape, problem.queries(first, batch), table.view(),
                         scan.allowed(batch), answer.view(),
                         Workspace(MolScanOp::kAverage, shape, table, batch, 140), {});
        };
        const MolAnswer all(device_, problem.batch, 140);
        search(0, problem.batch, all);
        for (int64_t b = 0; b < problem.batch; ++b) {
          const MolAnswer one(device_, 1, 140);
          search(b, 1, one);
          for (int64_t j = 0; j < 140; ++j) {
            const int64_t at = b * 140 + j;
            ASSERT_EQ(one.keys[j], all.keys[at]) << "a batch of one";
            ASSERT_NE(all.slots[at], 33);
            double expected = 0;
            const bool exact = storage == MolStorage::kBF16;
            for (int64_t k = 0; k < dim; ++k) {
              double item = mean(x, all.slots[at], 3, k, exact && !means);
              if (exact && means) item = Bf16(item);
              expected += mean(q, b, 5, k, false) * item;
            }
            // int8: half a step of 1/127 of the largest element, dim of them at random.
            ASSERT_NEAR(MolKeyScore(all.keys[at]), expected, exact ? 1e-6 : 0.02)
                << "dim " << dim << " means " << means;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MolStagesTest, ::testing::ValuesIn(DeviceCases()), MolDeviceName);

}  // namespace
}  // namespace trireme
