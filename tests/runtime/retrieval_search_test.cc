// Search against the golden files and against one rank alone, in every mode, sharding, batch and k.
// Run on 1, 2, 3, 4 and 8 ranks.
#include "runtime/retrieval_search.h"

#include <algorithm>
#include <cmath>
#include <fstream>

#include "models/mol_planted.h"
#include "tests/golden_mol.h"
#include "tests/runtime/retrieval_fixture.h"

namespace trireme {
namespace {

RetrievalOptions Options(RetrievalMode mode, int64_t k) {
  RetrievalOptions options;
  options.mode = mode;
  options.k = k;
  return options;
}

TEST_F(RetrievalTest, GoldenAnswers) {
  for (const std::string& name : GoldenMolNames()) {
    const GoldenMol golden = ReadGoldenMol(name);
    const std::string dir = File(name, [&](const std::string& path) { golden.WriteModel(path); });
    auto model = MolModel::Load(dir, device_.stream());
    ASSERT_TRUE(model.ok()) << model.status();
    TestItems items;
    items.dim = golden.config.item_dim;
    items.embeddings = golden.floats("input.item_embeddings");
    const bool with_ids = golden.integers.count("input.item_ids") > 0;
    for (int64_t i = 0; i < golden.items; ++i) {
      items.ids.push_back(with_ids ? golden.integers.at("input.item_ids")[i] : i);
    }
    const std::string path =
        File(name + ".safetensors", [&](const std::string& path) { WriteItems(items, path); });
    const auto table = Build(job_, **model, path);
    std::vector<RetrievalQuery> queries(golden.batch);
    const std::vector<float> raw = golden.floats("input.query_embeddings");
    for (int64_t b = 0; b < golden.batch; ++b) {
      const auto row = raw.begin() + b * golden.config.query_dim;
      queries[b].embedding.assign(row, row + golden.config.query_dim);
      if (golden.integers.count("input.user_ids") > 0)
        queries[b].user_id = golden.integers.at("input.user_ids")[b];
    }
    const auto expect = [&](const std::vector<RetrievalAnswer>& answers, const std::string& part) {
      const std::vector<double>& scores = golden.values("ref." + part + "_scores");
      for (int64_t b = 0; b < golden.batch; ++b) {
        for (int64_t j = 0; j < golden.k; ++j) {
          const size_t at = b * golden.k + j;
          EXPECT_NEAR(answers[b].scores[j], scores[at], 5e-5) << name << " " << part;
          const bool alone = (j == 0 || scores[at - 1] - scores[at] > 1e-4) &&
                             (j + 1 == golden.k || scores[at] - scores[at + 1] > 1e-4);
          // The reference's own order among ties is unspecified; ours is the stored one.
          if (!with_ids || (!alone && part != "topk")) continue;
          if (alone || name == "tiny_2x2x8") {
            EXPECT_EQ(answers[b].ids[j], golden.integers.at("ref." + part + "_ids")[at])
                << name << " " << part << " " << b << ", " << j;
          }
        }
      }
    };
    expect(Search(*table, queries, Options(RetrievalMode::kExact, golden.k)), "topk");
    expect(Search(*table, queries, Options(RetrievalMode::kPruned, golden.k)), "topk");
    if (!with_ids) continue;
    RetrievalOptions two = Options(RetrievalMode::kTwoStage, golden.k);
    two.average_k = golden.average_k;
    two.each_k = golden.each_k;
    const std::pair<FirstStage, const char*> stages[] = {
        {FirstStage::kAverage, "avg_topk"},
        {FirstStage::kPerEmbedding, "perembd_topk"},
        {FirstStage::kCombined, "comb_topk"}};
    for (const auto& [stage, part] : stages) {
      two.first_stage = stage;
      expect(Search(*table, queries, two), part);
    }
    std::vector<RetrievalQuery> filtered = queries;
    for (int64_t b = 0; b < golden.batch; ++b) {
      const auto seen = golden.integers.at("input.seen_ids").begin() + b * 3;
      filtered[b].exclude_ids.assign(seen, seen + 3);
    }
    expect(Search(*table, filtered, Options(RetrievalMode::kPruned, golden.k)), "filtered_topk");
  }
}

TEST_F(RetrievalTest, EveryShardingBatchModeAndKGivesTheSameBits) {
  const auto model = Model(SmallHead());
  const int64_t n = 700, ranks = World().size();
  TestItems items = RandomItems(n, 10, 5);
  // Ties across shards: items 650 and on are copies of the first ones.
  std::copy_n(items.embeddings.begin(), 50 * 10, items.embeddings.begin() + 650 * 10);
  const std::string path =
      File("items.safetensors", [&](const std::string& path) { WriteItems(items, path); });
  std::vector<std::vector<int64_t>> cuts = {{}};
  // All rows on the last rank; and one row on the first, the rest on the last.
  cuts.emplace_back(ranks + 1, 0);
  cuts.back().back() = n;
  cuts.emplace_back(ranks + 1, ranks == 1 ? 0 : 1);
  cuts.back().front() = 0, cuts.back().back() = n;
  const std::vector<RetrievalQuery> queries = Queries(*model, 67, 9);
  RetrievalOptions two = Options(RetrievalMode::kTwoStage, 20);
  two.average_k = 90;
  two.each_k = 7;
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    RetrievalTableOptions options;
    options.storage = storage;
    options.means = storage != MolStorage::kF32;
    const auto whole = Build(alone_, *model, path, options);
    for (const auto& cut : cuts) {
      options.row_begins = cut;
      const auto table = Build(job_, *model, path, options);
      EXPECT_EQ(table->size(), n);
      for (const int64_t k : {1, 33, 700, 2048}) {
        const auto expected = Search(*whole, queries, Options(RetrievalMode::kExact, k));
        ExpectSame(Search(*table, queries, Options(RetrievalMode::kExact, k)), expected);
        ExpectSame(Search(*table, queries, Options(RetrievalMode::kPruned, k)), expected);
        if (storage != MolStorage::kF32) break;
      }
      for (const FirstStage stage :
           {FirstStage::kAverage, FirstStage::kPerEmbedding, FirstStage::kCombined}) {
        two.first_stage = stage;
        ExpectSame(Search(*table, queries, two), Search(*whole, queries, two));
      }
      const auto all = Search(*table, queries, Options(RetrievalMode::kPruned, 5));
      const auto one = Search(*table, {queries[66]}, Options(RetrievalMode::kPruned, 5));
      ExpectSame(one, {all[66]});
    }
  }
}

// Another communicator's calls, with the bytes that this rank gives to its gathers.
class CountingCommunicator final : public Communicator {
 public:
  explicit CountingCommunicator(Communicator* to) : to_(to) {
    rank_ = to->rank();
    size_ = to->size();
  }
  int64_t gathered_bytes = 0;

 private:
  void DoAllReduceSum(Stream& stream, TensorView data) override { to_->AllReduceSum(stream, data); }
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    gathered_bytes += in.bytes();
    to_->AllGather(stream, in, out);
  }
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    return to_->Send(stream, data, peer);
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override { to_->WaitSend(stream, ticket); }
  void DoRecv(Stream& stream, TensorView data, int peer) override { to_->Recv(stream, data, peer); }
  Communicator* const to_;
};

TEST_F(RetrievalTest, APlaceCrossesRanksAsTwelveBytes) {
  const auto model = Model(SmallHead());
  constexpr int64_t kItems = 200, kQueries = 3, kBest = 10;
  TestItems items = RandomItems(kItems, 10, 5);
  CountingCommunicator counting(job_.communicator);
  const RetrievalGroup group = {&World(), &counting, &device_.stream()};
  const std::vector<RetrievalQuery> queries = Queries(*model, kQueries, 9);
  for (const bool ties : {false, true}) {
    // The last row of the last rank is the first of the first; all are asked for, so both come.
    if (ties) std::copy_n(items.embeddings.begin(), 10, items.embeddings.end() - 10);
    const int64_t k = ties ? kItems : kBest;
    const std::string path = File(ties ? "ties.safetensors" : "items.safetensors",
                                  [&](const std::string& path) { WriteItems(items, path); });
    const auto table = Build(group, *model, path), whole = Build(alone_, *model, path);
    counting.gathered_bytes = 0;
    const auto answers = Search(*table, queries, Options(RetrievalMode::kPruned, k));
    ExpectSame(answers, Search(*whole, queries, Options(RetrievalMode::kPruned, k)));
    const bool open = ties && group.size() > 1;
    EXPECT_EQ(counting.gathered_bytes, kQueries * k * (open ? 16 : 12));
  }
}

TEST_F(RetrievalTest, CertifiedAnswersAreTheExactOnes) {
  const auto model = Model(SmallHead());
  const std::string path = File("items.safetensors", [&](const std::string& path) {
    WriteItems(RandomItems(600, 10, 6), path);
  });
  const auto table = Build(job_, *model, path);
  const std::vector<RetrievalQuery> queries = Queries(*model, 40, 10);
  const auto exact = Search(*table, queries, Options(RetrievalMode::kExact, 10));
  int certified = 0, uncertified = 0;
  for (const int64_t each_k : {1, 3, 10, 30, 100, 300, 700}) {
    RetrievalOptions two = Options(RetrievalMode::kTwoStage, 10);
    two.first_stage = FirstStage::kPerEmbedding;
    two.each_k = each_k;
    const auto answers = Search(*table, queries, two);
    for (size_t b = 0; b < queries.size(); ++b) {
      ++(answers[b].exact ? certified : uncertified);
      if (!answers[b].exact) continue;
      EXPECT_EQ(answers[b].ids, exact[b].ids) << "each_k " << each_k;
      EXPECT_EQ(answers[b].scores, exact[b].scores);
    }
    two.exact_or_certified = true;
    ExpectSame(Search(*table, queries, two), exact);
  }
  EXPECT_GE(certified, 40);
  EXPECT_GE(uncertified, 40);
}

TEST_F(RetrievalTest, FiltersAndExcludedIdsEqualFilterThenSort) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(500, 10, 7, /*attributes=*/true);
  const std::string path =
      File("items.safetensors", [&](const std::string& path) { WriteItems(items, path); });
  const auto table = Build(job_, *model, path);
  const auto everything = [&](const RetrievalQuery& query) {
    RetrievalQuery plain = query;
    plain.filter.clear();
    plain.exclude_ids.clear();
    return Search(*table, {plain}, Options(RetrievalMode::kExact, 500))[0];
  };
  const std::pair<const char*, bool (*)(uint64_t)> filters[] = {
      {"a", [](uint64_t w) { return (w & 1) != 0; }},
      {"!a & b", [](uint64_t w) { return (w & 1) == 0 && (w & 2) != 0; }},
      {"(a | !c) AND NOT d", [](uint64_t w) { return ((w & 1) || !(w & 4)) && !(w & 8); }},
      {"a & !a", [](uint64_t) { return false; }},
      {"", [](uint64_t) { return true; }}};
  std::vector<RetrievalQuery> queries = Queries(*model, 10, 11);
  for (size_t i = 0; i < queries.size(); ++i) {
    queries[i].filter = filters[i % 5].first;
    if (i >= 5) queries[i].exclude_ids = {items.ids[3], items.ids[499], -5, 999999999};
  }
  for (const RetrievalMode mode :
       {RetrievalMode::kExact, RetrievalMode::kPruned, RetrievalMode::kTwoStage}) {
    RetrievalOptions options = Options(mode, 30);
    options.exact_or_certified = true;
    const auto answers = Search(*table, queries, options);
    for (size_t i = 0; i < queries.size(); ++i) {
      const RetrievalAnswer all = everything(queries[i]);
      std::vector<int64_t> expected;
      for (size_t j = 0; j < all.ids.size() && expected.size() < 30; ++j) {
        const auto row = std::find(items.ids.begin(), items.ids.end(), all.ids[j]);
        const auto& out = queries[i].exclude_ids;
        if (std::find(out.begin(), out.end(), all.ids[j]) != out.end()) continue;
        if (filters[i % 5].second(items.attributes[row - items.ids.begin()]))
          expected.push_back(all.ids[j]);
      }
      expected.resize(30, -1);
      EXPECT_EQ(answers[i].ids, expected) << "filter " << queries[i].filter;
    }
  }
  std::vector<uint32_t> rows(1, 0b1001);
  auto some =
      SearchTable(*table, {queries[4]}, Options(RetrievalMode::kPruned, 3), {.rows = &rows});
  ASSERT_TRUE(some.ok());
  std::vector<int64_t> two = {(*some)[0].ids[0], (*some)[0].ids[1]};
  std::sort(two.begin(), two.end());
  std::vector<int64_t> expected = {items.ids[0], items.ids[3]};
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(two, expected);
  EXPECT_EQ((*some)[0].ids[2], -1);
}

TEST_F(RetrievalTest, BadQueriesFailAlone) {
  const auto model = Model(SmallHead());
  const std::string path = File("items.safetensors", [&](const std::string& path) {
    WriteItems(RandomItems(100, 10, 8, true), path);
  });
  const auto table = Build(job_, *model, path);
  std::vector<RetrievalQuery> queries = Queries(*model, 8, 12);
  const auto good = Search(*table, queries, Options(RetrievalMode::kPruned, 10));
  queries[1].embedding[3] = NAN;
  queries[2].embedding[0] = INFINITY;
  queries[3].embedding.pop_back();
  queries[4].filter = "nope";
  queries[5].user_id = -1;
  for (float& value : queries[6].embedding) value *= 1e30f;
  const auto answers = Search(*table, queries, Options(RetrievalMode::kPruned, 10));
  const char* messages[] = {"",
                            "NaN",
                            "NaN",
                            "11 elements; the model's query_dim is 12",
                            "no attribute \"nope\"",
                            "user_id -1",
                            "the query is too large: its projection is not finite",
                            ""};
  for (size_t i = 0; i < queries.size(); ++i) {
    EXPECT_NE(std::string(answers[i].status.message()).find(messages[i]), std::string::npos);
    if (answers[i].status.ok()) {
      EXPECT_EQ(answers[i].ids, good[i].ids);
    } else {
      EXPECT_TRUE(answers[i].ids.empty());
    }
  }
  EXPECT_FALSE(answers[1].status.ok());
  const auto none = Search(*table, {queries[0]}, Options(RetrievalMode::kPruned, 0));
  EXPECT_TRUE(none[0].status.ok() && none[0].ids.empty());
  EXPECT_FALSE(SearchTable(*table, queries, Options(RetrievalMode::kPruned, 2049)).ok());
  EXPECT_FALSE(SearchTable(*table, queries, Options(RetrievalMode::kPruned, -1)).ok());
  RetrievalOptions two = Options(RetrievalMode::kTwoStage, 10);
  two.average_k = 0;
  EXPECT_FALSE(SearchTable(*table, queries, two).ok());
}

TEST_F(RetrievalTest, AnEmptyTableAnswersNothing) {
  const auto model = Model(SmallHead());
  const auto table = RetrievalTable::Create(job_, *model, {}, {});
  ASSERT_TRUE(table.ok());
  for (const RetrievalMode mode :
       {RetrievalMode::kExact, RetrievalMode::kPruned, RetrievalMode::kTwoStage}) {
    const auto answers = Search(**table, Queries(*model, 2, 13), Options(mode, 4));
    EXPECT_EQ(answers[1].ids, std::vector<int64_t>(4, -1));
    EXPECT_EQ(answers[1].scores, std::vector<float>(4, -INFINITY));
    EXPECT_TRUE(answers[1].exact);
  }
}

// The published figures for planted data: the mean of the logits finds nearly all of the best 100
// in 2.5% of the items; pruning leaves few pairs to the gate.
TEST_F(RetrievalTest, TwoStageRecallOnPlantedData) {
  constexpr int64_t kItems = 20000;
  const PlantedMol planted({.seed = 3});
  const std::string dir =
      File("planted", [&](const std::string& path) { ASSERT_TRUE(planted.WriteModel(path).ok()); });
  const std::string path = File("items.safetensors", [&](const std::string& path) {
    TestItems items;
    items.dim = planted.config().item_dim;
    items.embeddings.resize(kItems * items.dim);
    planted.FillItems(0, kItems, items.embeddings.data());
    for (int64_t i = 0; i < kItems; ++i) items.ids.push_back(i);
    WriteItems(items, path);
  });
  auto model = MolModel::Load(dir, device_.stream());
  ASSERT_TRUE(model.ok()) << model.status();
  const auto table = Build(job_, **model, path);
  std::vector<RetrievalQuery> queries(4);
  for (int64_t b = 0; b < 4; ++b) {
    queries[b].embedding.resize(planted.config().query_dim);
    planted.FillQueries(b, 1, queries[b].embedding.data());
  }
  RetrievalCounts counts;
  const auto exact =
      SearchTable(*table, queries, Options(RetrievalMode::kPruned, 100), {.counts = &counts});
  ASSERT_TRUE(exact.ok());
  // Each rank's own floor: with few items a rank prunes less.
  EXPECT_LT(static_cast<double>(counts.scan.gated) / counts.scan.pairs,
            World().size() == 1 ? 0.15 : 0.6);
  RetrievalOptions two = Options(RetrievalMode::kTwoStage, 100);
  two.first_stage = FirstStage::kAverage;
  two.average_k = 500;
  const auto approximate = Search(*table, queries, two);
  int found = 0;
  for (int64_t b = 0; b < 4; ++b) {
    for (const int64_t id : (*exact)[b].ids) {
      found += std::count(approximate[b].ids.begin(), approximate[b].ids.end(), id);
    }
  }
  EXPECT_GE(found, 0.98 * 400);
}

// As many candidates as there may be, of as many items: the second stage has them all.
TEST_F(RetrievalTest, TheLargestFirstStage) {
  const auto model = Model(SmallHead());
  const std::string path = File("items.npy", [&](const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    out << NpyHeaderBytes("<f4", {kMaxFirstStageK, 10});
    for (int64_t i = 0; i < kMaxFirstStageK * 10; ++i) {
      const auto value = static_cast<float>(RandomValue(67, i));
      out.write(reinterpret_cast<const char*>(&value), sizeof(value));
    }
  });
  const auto table = Build(job_, *model, path);
  ASSERT_EQ(table->size(), kMaxFirstStageK);
  const std::vector<RetrievalQuery> queries = Queries(*model, 2, 68);
  RetrievalOptions two = Options(RetrievalMode::kTwoStage, kMaxRetrievalK);
  two.first_stage = FirstStage::kAverage;
  two.average_k = kMaxFirstStageK;
  ExpectSame(Search(*table, queries, two),
             Search(*table, queries, Options(RetrievalMode::kExact, kMaxRetrievalK)));
  two.average_k = kMaxFirstStageK + 1;
  EXPECT_NE(SearchTable(*table, queries, two).status().message().find("from 1 to 100000"),
            std::string::npos);
  two = Options(RetrievalMode::kExact, kMaxRetrievalK + 1);
  EXPECT_NE(SearchTable(*table, queries, two).status().message().find("from 0 to 2048"),
            std::string::npos);
}

// The published 8x4x64 head on random items: rounding the table moves few items out of the best
// 100.
TEST_F(RetrievalTest, RoundedTablesFindTheSameItems) {
  const GoldenMol golden = ReadGoldenMol("rails_8x4x64");
  const std::string dir = File("m", [&](const std::string& path) { golden.WriteModel(path); });
  const auto model = MolModel::Load(dir, device_.stream());
  ASSERT_TRUE(model.ok()) << model.status();
  const std::string path = File("items.safetensors", [&](const std::string& path) {
    WriteItems(RandomItems(4000, golden.config.item_dim, 61), path);
  });
  const std::vector<RetrievalQuery> queries = Queries(**model, 8, 62);
  const auto exact =
      Search(*Build(job_, **model, path), queries, Options(RetrievalMode::kPruned, 100));
  for (const MolStorage storage : {MolStorage::kBF16, MolStorage::kInt8}) {
    RetrievalTableOptions options;
    options.storage = storage;
    const auto answers =
        Search(*Build(job_, **model, path, options), queries, Options(RetrievalMode::kPruned, 100));
    int64_t same = 0;
    for (size_t b = 0; b < queries.size(); ++b) {
      for (const int64_t id : exact[b].ids) {
        same += std::count(answers[b].ids.begin(), answers[b].ids.end(), id);
      }
    }
    const double overlap = static_cast<double>(same) / 800.0;
    RecordProperty(storage == MolStorage::kBF16 ? "bf16" : "int8", std::to_string(overlap));
    EXPECT_GE(overlap, storage == MolStorage::kBF16 ? 0.99 : 0.98);
  }
}

TEST(MergeKeysTest, EqualsSorting) {
  for (const int64_t lists : {1, 2, 3, 8}) {
    for (const int64_t length : {1, 5, 32}) {
      std::vector<uint64_t> keys(lists * length), all;
      for (int64_t l = 0; l < lists; ++l) {
        const int64_t there = (l * 7 + length) % (length + 1);
        for (int64_t i = 0; i < there; ++i)
          keys[l * length + i] = 1 + static_cast<uint64_t>((RandomValue(l + 3, i) + 1) * 1e12);
        const auto begin = keys.begin() + l * length;
        std::sort(begin, begin + length, std::greater<>());
        all.insert(all.end(), begin, begin + there);
      }
      std::sort(all.begin(), all.end(), std::greater<>());
      std::vector<uint64_t> merged;
      MergeKeys(keys.data(), lists, length, length, 20,
                [&](int64_t l, int64_t i) { merged.push_back(keys[l * length + i]); });
      all.resize(std::min<size_t>(all.size(), 20));
      EXPECT_EQ(merged, all);
    }
  }
}

}  // namespace
}  // namespace trireme
