// Searches that are replayed, in the emulator: the answers are those without graphs, bit for bit,
// whatever happens to the table meanwhile; what cannot be replayed runs as before and is counted.
// Run on 1 and 2 ranks.
#include "runtime/retrieval_graphs.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/metrics.h"
#include "runtime/retrieval_service.h"
#include "tests/runtime/retrieval_fixture.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

TEST_F(RetrievalTest, ADeviceThatDoesItsWorkAtOnceReplaysNothing) {
  const auto model = Model(SmallHead());
  const std::string path = File("items.safetensors", [](const std::string& path) {
    WriteItems(RandomItems(100, 10, 5), path);
  });
  const auto table = Build(job_, *model, path);
  const auto graphs = RetrievalGraphs::Create(*table, job_, {}).value();
  const std::vector<RetrievalQuery> queries = Queries(*model, 3, 9);
  const RetrievalOptions options;
  const auto answers = SearchTable(*table, queries, options, {.graphs = graphs.get()}).value();
  ExpectSame(answers, Search(*table, queries, options));
  EXPECT_EQ(graphs->stats().eager_runs(EagerReason::kDevice), 1);
  EXPECT_EQ(graphs->bytes(), 0);
}

#if !defined(TRIREME_HOST_CUDA)
TEST(RetrievalGraphsTest, NeedsTheEmulator) {
  GTEST_SKIP() << "SKIPPED: graphs in the emulator: no cuda_bf16.h";
}
#else

constexpr int64_t kItems = 500, kDim = 10, kBest = 12;

std::vector<float> Row(uint64_t seed) {
  std::vector<float> row(kDim);
  for (int64_t k = 0; k < kDim; ++k) row[k] = static_cast<float>(RandomValue(seed, k));
  return row;
}

class RetrievalGraphsTest : public RetrievalTest {
 protected:
  RetrievalGraphsTest() {
    group_ = {&World(), groups_->tp.get(), stream_.get()};
    WriteRandomHead(SmallHead(), head_.path(), 1);
    model_ = MolModel::Load(head_.path(), *stream_).value();
    items_ = RandomItems(kItems, kDim, 5, /*attributes=*/true);
    path_ = File("items.safetensors", [&](const std::string& path) { WriteItems(items_, path); });
  }
  ~RetrievalGraphsTest() override { HostCudaTestHooks() = {}; }

  std::unique_ptr<RetrievalTable> Table(MolStorage storage = MolStorage::kF32) {
    RetrievalTableOptions options;
    options.storage = storage;
    options.capacity = kItems + 50;
    return Build(group_, *model_, path_, options);
  }
  // Exact, pruned, and a two-stage search of each kind.
  static std::vector<RetrievalOptions> Searches() {
    std::vector<RetrievalOptions> all = {Best(RetrievalMode::kExact), Best(RetrievalMode::kPruned)};
    for (const FirstStage stage :
         {FirstStage::kAverage, FirstStage::kPerEmbedding, FirstStage::kCombined}) {
      all.push_back(Best(RetrievalMode::kTwoStage));
      all.back().first_stage = stage;
      all.back().average_k = 40;
      all.back().each_k = 9;
    }
    return all;
  }
  // Ranks here exchange the lists of a first stage through the host, which no graph holds.
  static bool Captured(const RetrievalOptions& search) {
    return search.mode != RetrievalMode::kTwoStage || World().size() == 1;
  }
  static int64_t NumGraphs() { return World().size() == 1 ? 15 : 6; }
  static RetrievalGraphOptions Options() {
    RetrievalGraphOptions options;
    options.searches = Searches();
    options.batches = {1, 4, 9};
    options.max_excluded = 6;
    return options;
  }
  // With filters, and slots that are excluded.
  std::vector<RetrievalQuery> SomeQueries(int64_t count, uint64_t seed) const {
    std::vector<RetrievalQuery> queries = Queries(*model_, count, seed);
    for (int64_t b = 0; b < count; ++b) {
      if (b % 3 == 1) queries[b].filter = "(a | b)";
      if (b % 4 == 2) queries[b].filter = "!a";
      if (b % 5 == 0) queries[b].exclude_ids = {items_.ids[b], items_.ids[100 + b]};
    }
    return queries;
  }
  static RetrievalOptions Best(RetrievalMode mode, int64_t k = kBest) {
    RetrievalOptions options;
    options.mode = mode;
    options.k = k;
    return options;
  }
  // With graphs and without: the same.
  void ExpectEqual(const RetrievalTable& table, RetrievalGraphs& graphs,
                   const std::vector<RetrievalQuery>& queries, const RetrievalOptions& options) {
    const auto answers = SearchTable(table, queries, options, {.graphs = &graphs});
    ASSERT_TRUE(answers.ok()) << answers.status();
    ExpectSame(*answers, Search(table, queries, options));
  }

  std::unique_ptr<Device> emulated_ = NewHostCudaDevice();
  std::unique_ptr<Stream> stream_ = emulated_->NewStream().value();
  RetrievalGroup group_;
  ScratchDir head_;
  std::unique_ptr<MolModel> model_;
  TestItems items_;
  std::string path_;
};

TEST_F(RetrievalGraphsTest, ReplaysGiveTheBitsOfEagerSearches) {
  std::vector<MolStorage> storages = {MolStorage::kInt8};
  if (!kThreadSanitizer) storages = {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8};
  for (const MolStorage storage : storages) {
    const auto table = Table(storage);
    const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
    EXPECT_EQ(graphs->stats().graphs, NumGraphs());
    EXPECT_GT(graphs->bytes(), 0);
    int64_t searches = 0, eager = 0;
    for (int64_t round = 0; round < (kSanitizer ? 2 : 3); ++round) {
      // Larger and smaller batches in turn: what the one before left must not show.
      for (const int64_t batch : {9, 1, 3, 4, 6, 2}) {
        for (const RetrievalOptions& search : Searches()) {
          // Once, after updates: the emulator is slow.
          if (search.mode == RetrievalMode::kTwoStage && round != 1) continue;
          ExpectEqual(*table, *graphs, SomeQueries(batch, 20 + 10 * round + batch), search);
          ++(Captured(search) ? searches : eager);
        }
      }
      // The table goes on under the graphs.
      table->Delete({items_.ids[3 * round], items_.ids[200 + round]});
      RetrievalItems more{{100'000 + round}, Row(round), {1}};
      ASSERT_TRUE(table->Upsert(more).ok());
      more.ids[0] = items_.ids[300 + round];
      ASSERT_TRUE(table->Upsert(more).ok());
    }
    EXPECT_EQ(graphs->stats().replays, searches);
    for (int i = 0; i < kEagerReasons; ++i) {
      const bool by_host = static_cast<EagerReason>(i) == EagerReason::kCommunicator;
      EXPECT_EQ(graphs->stats().eager[i], by_host ? eager : 0) << i;
    }
  }
}

// What follows a two-stage search where it proves nothing is another search that is replayed.
TEST_F(RetrievalGraphsTest, WhatIsNotProvenIsReplayedToo) {
  const auto table = Table();
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  RetrievalOptions search = Searches()[2];
  search.exact_or_certified = true;
  const std::vector<RetrievalQuery> queries = SomeQueries(4, 60);
  ExpectEqual(*table, *graphs, queries, search);
  EXPECT_EQ(graphs->stats().replays, World().size() == 1 ? 2 : 1);
  ExpectSame(SearchTable(*table, queries, search, {.graphs = graphs.get()}).value(),
             Search(*table, queries, Best(RetrievalMode::kExact)));
}

TEST_F(RetrievalGraphsTest, AReplayCountsItsWork) {
  const auto table = Table(MolStorage::kBF16);
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  const std::vector<RetrievalQuery> queries = SomeQueries(3, 70);
  int64_t replays = 0;
  for (const RetrievalOptions& search : Searches()) {
    RetrievalCounts replayed, eager;
    ASSERT_TRUE(
        SearchTable(*table, queries, search, {.counts = &replayed, .graphs = graphs.get()}).ok());
    ASSERT_TRUE(SearchTable(*table, queries, search, {.counts = &eager}).ok());
    EXPECT_GT(eager.scan.pairs, 0);
    EXPECT_EQ(replayed.scan.pairs, eager.scan.pairs);
    EXPECT_EQ(replayed.scan.gated, eager.scan.gated);
    EXPECT_EQ(replayed.scan.not_finite, eager.scan.not_finite);
    EXPECT_EQ(graphs->stats().replays, replays += Captured(search) ? 1 : 0);
  }
}

TEST_F(RetrievalGraphsTest, WhatHasNoGraphRunsEagerlyAndIsCounted) {
  const auto table = Table();
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  int64_t eager = 0;
  const auto expect_eager = [&](const std::vector<RetrievalQuery>& queries,
                                const RetrievalOptions& options) {
    ExpectEqual(*table, *graphs, queries, options);
    EXPECT_EQ(graphs->stats().eager_runs(EagerReason::kNotCaptured), ++eager);
  };
  expect_eager(SomeQueries(10, 7), Best(RetrievalMode::kPruned));            // too many queries
  expect_eager(SomeQueries(2, 7), Best(RetrievalMode::kPruned, kBest + 1));  // another k
  std::vector<RetrievalQuery> queries = SomeQueries(2, 7);
  queries[1].exclude_ids.assign(items_.ids.begin(), items_.ids.begin() + 20);  // too many slots
  expect_eager(queries, Best(RetrievalMode::kExact));
  EXPECT_EQ(graphs->stats().replays, 0);
}

TEST_F(RetrievalGraphsTest, GraphsThatAreOffOrCannotBeCapturedCostNothingElse) {
  const auto table = Table();
  RetrievalGraphOptions options = Options();
  options.never = EagerReason::kOff;
  const auto off = RetrievalGraphs::Create(*table, group_, options).value();
  ExpectEqual(*table, *off, SomeQueries(3, 8), Best(RetrievalMode::kPruned));
  EXPECT_EQ(off->stats().eager_runs(EagerReason::kOff), 1);
  EXPECT_EQ(off->bytes(), 0);

  // On the last rank alone: there is nothing of the others in what is captured.
  std::vector<std::string> warnings;
  options = Options();
  options.warn = [&](const std::string& line) { warnings.push_back(line); };
  const bool here = World().rank() == World().size() - 1;
  if (here) HostCudaTestHooks().captured = [] { return absl::InternalError("no captures today"); };
  const auto failed = RetrievalGraphs::Create(*table, group_, options).value();
  HostCudaTestHooks().captured = nullptr;
  ExpectEqual(*table, *failed, SomeQueries(3, 8), Best(RetrievalMode::kPruned));
  EXPECT_EQ(failed->stats().replays, here ? 0 : 1);
  EXPECT_EQ(failed->stats().refusals(EagerReason::kCaptureFailed), here ? NumGraphs() : 0);
  ASSERT_EQ(warnings.size(), 1u) << "on all ranks, of the one that could not";
  EXPECT_EQ(warnings[0],
            "exact search of 1 runs without a graph: it could not be captured (no captures today); "
            "more are counted, not told");
}

TEST_F(RetrievalGraphsTest, CapturesWithoutMemoryShowWhatTheRankHolds) {
  const auto table = Table();
  std::vector<std::string> warnings;
  RetrievalGraphOptions options = Options();
  options.warn = [&](const std::string& line) { warnings.push_back(line); };
  const int last = World().size() - 1;
  HostCudaTestHooks().captured = [last] {
    return World().rank() == last ? absl::ResourceExhaustedError("out of memory")
                                  : absl::OkStatus();
  };
  const auto graphs = RetrievalGraphs::Create(*table, group_, options).value();
  HostCudaTestHooks().captured = nullptr;
  EXPECT_EQ(graphs->stats().graphs == 0, World().rank() == last);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].find("exact search of 1 runs without a graph: it could not be captured "
                             "(out of memory); more are counted, not told; use more ranks or a "
                             "smaller table, or --no-graphs\nrank " +
                             std::to_string(last) + " ("),
            0u)
      << warnings[0];
  for (const char* part : {") holds:\n  weights ", "\n  items ", "\n  total "})
    EXPECT_NE(warnings[0].find(part), std::string::npos) << part << warnings[0];
}

// Says that its calls may be captured, though they go through the host.
class BoastingCommunicator final : public Communicator {
 public:
  explicit BoastingCommunicator(Communicator* to) : to_(to) {
    rank_ = to->rank();
    size_ = to->size();
  }
  bool capturable() const override { return true; }

 private:
  void DoAllReduceSum(Stream& stream, TensorView data) override { to_->AllReduceSum(stream, data); }
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    to_->AllGather(stream, in, out);
  }
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    return to_->Send(stream, data, peer);
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override { to_->WaitSend(stream, ticket); }
  void DoRecv(Stream& stream, TensorView data, int peer) override { to_->Recv(stream, data, peer); }
  Communicator* const to_;
};

// What ranks do together is replayed by all of them or by none: here the exchange of keys is no
// part of the graphs, whose trials find it missing.
TEST_F(RetrievalGraphsTest, AnExchangeThatIsNotCapturedIsFoundOut) {
  if (World().size() == 1) GTEST_SKIP() << "one rank exchanges nothing";
  BoastingCommunicator boasting(group_.communicator);
  group_.communicator = &boasting;
  const auto table = Table();
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  EXPECT_EQ(graphs->stats().graphs, 6);
  EXPECT_EQ(graphs->stats().refusals(EagerReason::kNotEqual), 9);
  for (const RetrievalOptions& search : Searches())
    ExpectEqual(*table, *graphs, SomeQueries(4, 80), search);
  EXPECT_EQ(graphs->stats().replays, 2);
  EXPECT_EQ(graphs->stats().eager_runs(EagerReason::kNotEqual), 3);

  // One rank that cannot capture: none does what all do together.
  const bool here = World().rank() == 1;
  if (here) HostCudaTestHooks().captured = [] { return absl::InternalError("no captures today"); };
  const auto failed = RetrievalGraphs::Create(*table, group_, Options()).value();
  HostCudaTestHooks().captured = nullptr;
  EXPECT_EQ(failed->stats().refusals(EagerReason::kCaptureFailed), here ? 15 : 9);
  EXPECT_EQ(failed->stats().graphs, here ? 0 : 6);
}

TEST_F(RetrievalGraphsTest, OneRankWithoutMemoryIsAStatusOnAll) {
  const auto table = Table();
  if (World().rank() == World().size() - 1) {
    HostCudaTestHooks().allocating = [](size_t) {
      return absl::ResourceExhaustedError("the device is full");
    };
  }
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options());
  EXPECT_EQ(graphs.status().code(), absl::StatusCode::kResourceExhausted);
  for (const char* part :
       {"searches of up to 9 queries with k 12 need", ") holds:\n  weights ", "\n  items "})
    EXPECT_NE(graphs.status().message().find(part), std::string::npos) << part << graphs.status();
}

TEST_F(RetrievalGraphsTest, AServiceReplays) {
  const auto table = Table();
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  const std::vector<RetrievalQuery> queries = SomeQueries(4, 30);
  const auto expected = Search(*table, queries, Best(RetrievalMode::kPruned));
  RetrievalService service(group_, {.max_batch = 4});
  service.AddTable(table.get(), graphs.get());
  if (World().rank() > 0) {
    service.Follow();
  } else {
    std::vector<RetrievalAnswer> answers;
    for (const RetrievalQuery& query : queries) {
      RetrievalRequest request;
      request.query = query;
      request.options = Best(RetrievalMode::kPruned);
      request.done = [&](RetrievalAnswer answer) { answers.push_back(std::move(answer)); };
      ASSERT_TRUE(service.Submit(std::move(request)).ok());
    }
    service.Stop();
    service.Run();
    service.Finish();
    ExpectSame(answers, expected);
  }
  EXPECT_EQ(graphs->stats().replays, 1);
}

// Every byte that was taken of the device has an owner, and a scrape sees them.
TEST_F(RetrievalGraphsTest, TheirMemoryIsInLedgerAndMetrics) {
  const int64_t before = emulated_->allocated_bytes();
  const auto table = Table(MolStorage::kInt8);
  const auto graphs = RetrievalGraphs::Create(*table, group_, Options()).value();
  const Ledger bare = RetrievalLedger(*table, nullptr);
  Ledger held = RetrievalLedger(*table, graphs.get());
  EXPECT_EQ(held[Owner::kGraphs], graphs->stats().bytes);
  EXPECT_EQ(held[Owner::kActivations], graphs->bytes());
  EXPECT_EQ(bare[Owner::kGraphs] + bare[Owner::kActivations], 0);
  EXPECT_EQ(held[Owner::kWeights], model_->weight_bytes());
  held[Owner::kWeights] = 0;  // was there before
  AccountFor(emulated_->allocated_bytes() - before, &held);
  EXPECT_EQ(held[Owner::kUnaccounted], 0) << LedgerTable(held, nullptr);
  EXPECT_NE(LedgerTable(held, nullptr).find("items "), std::string::npos);

  RetrievalService service(group_, {});
  service.AddTable(table.get(), graphs.get());
  const std::string text = PrometheusText(service.stats());
  for (const std::string& line :
       {absl::StrCat("retrieval_graphs ", graphs->stats().graphs),
        absl::StrCat("retrieval_graph_bytes ", graphs->stats().bytes),
        absl::StrCat("retrieval_bytes{owner=\"activations\"} ", graphs->bytes()),
        absl::StrCat("retrieval_bytes{owner=\"items\"} ", table->shard().device_bytes())}) {
    EXPECT_NE(text.find("\ntrireme_" + line + "\n"), std::string::npos) << line << "\n" << text;
  }
}

#endif

}  // namespace
}  // namespace trireme
