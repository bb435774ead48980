// One rank of several lacks memory, for a search or for a table: all ranks hear of it alike, nobody
// waits for ever, and what was there before answers on. Run on 2 and 3 ranks, in the emulator,
// whose device can be full.
#include <functional>

#include "runtime/retrieval_service.h"
#include "tests/runtime/retrieval_fixture.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

#if !defined(TRIREME_HOST_CUDA)
TEST(RetrievalFullRankTest, NeedsTheEmulator) {
  GTEST_SKIP() << "SKIPPED: a device that is full, in the emulator: no cuda_bf16.h";
}
#else

constexpr int64_t kItems = 300, kDim = 10;

RetrievalOptions Best(int64_t k) {
  RetrievalOptions options;
  options.k = k;
  return options;
}

class RetrievalFullRankTest : public RetrievalTest {
 protected:
  RetrievalFullRankTest() {
    group_ = {&World(), groups_->tp.get(), stream_.get()};
    WriteRandomHead(SmallHead(), scratch_head_.path(), 1);
    model_ = MolModel::Load(scratch_head_.path(), *stream_).value();
    items_ = File("items.safetensors",
                  [](const std::string& path) { WriteItems(RandomItems(kItems, kDim, 5), path); });
    queries_ = Queries(*model_, 6, 9);
  }
  ~RetrievalFullRankTest() override { HostCudaTestHooks().allocating = nullptr; }

  // From here on this rank alone asks `may` for every allocation of its device.
  void OnRank(int rank, std::function<bool(size_t bytes)> may) {
    HostCudaTestHooks().allocating = nullptr;
    if (World().rank() != rank) return;
    HostCudaTestHooks().allocating = [may = std::move(may)](size_t bytes) {
      return may(bytes) ? absl::OkStatus() : absl::ResourceExhaustedError("the device is full");
    };
  }
  void NoRank() { OnRank(-1, {}); }
  // All ranks have the same status, which says that memory lacks.
  void ExpectFull(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_NE(status.message().find("the device is full"), std::string::npos) << status;
    for (const std::string& other : World().AllGather(std::string(status.message())))
      EXPECT_EQ(other, status.message());
  }

  std::unique_ptr<Device> emulated_ = NewHostCudaDevice();
  std::unique_ptr<Stream> stream_ = emulated_->NewStream().value();
  RetrievalGroup group_;
  ScratchDir scratch_head_;
  std::unique_ptr<MolModel> model_;
  std::string items_;
  std::vector<RetrievalQuery> queries_;
};

TEST_F(RetrievalFullRankTest, QueriesThatDoNotFitFailOnAllRanksAndNothingElseDoes) {
  const auto expected = Search(*Build(group_, *model_, items_), queries_, Best(20));
  RetrievalOptions two = Best(20);
  two.mode = RetrievalMode::kTwoStage;
  two.exact_or_certified = true;
  for (int full = 0; full < World().size(); ++full) {
    const auto table = Build(group_, *model_, items_);
    for (const RetrievalOptions& options : {Best(20), two}) {
      OnRank(full, [](size_t) { return false; });
      for (const RetrievalAnswer& answer : Search(*table, queries_, options))
        ExpectFull(answer.status);
    }
    NoRank();
    for (const RetrievalOptions& options : {Best(20), two})
      ExpectSame(Search(*table, queries_, options), expected);
    // A larger search does not fit; what had enough for a small one still has it.
    const auto other = Build(group_, *model_, items_);
    size_t enough = 0;
    OnRank(full, [&enough](size_t bytes) {
      enough = std::max(enough, bytes);
      return true;
    });
    Search(*other, {queries_[0]}, Best(20));
    OnRank(full, [&enough](size_t bytes) { return bytes <= enough; });
    for (const RetrievalAnswer& answer : Search(*other, queries_, Best(kMaxRetrievalK)))
      ExpectFull(answer.status);
    ExpectSame(Search(*other, {queries_[0]}, Best(20)), {expected[0]});
    NoRank();
  }
}

TEST_F(RetrievalFullRankTest, ABatchThatDoesNotFitIsHalved) {
  const auto expected = Search(*Build(group_, *model_, items_), queries_, Best(20));
  for (int full = 0; full < World().size(); ++full) {
    // What two queries take, which six do not fit into.
    const auto first = Build(group_, *model_, items_), table = Build(group_, *model_, items_);
    size_t enough = 0;
    OnRank(full, [&enough](size_t bytes) {
      enough = std::max(enough, bytes);
      return true;
    });
    Search(*first, {queries_[0], queries_[1]}, Best(20));
    int refused = 0;
    OnRank(full, [&](size_t bytes) {
      refused += bytes > enough ? 1 : 0;
      return bytes <= enough;
    });
    ExpectSame(Search(*table, queries_, Best(20)), expected);
    EXPECT_EQ(refused > 0, World().rank() == full);
    NoRank();
  }
}

TEST_F(RetrievalFullRankTest, ATableThatDoesNotFitOneRankIsMadeOnNone) {
  const auto before = Build(group_, *model_, items_);
  const auto expected = Search(*before, queries_, Best(20));
  const std::string snapshot = dir_ + "/snapshot";
  ASSERT_TRUE(before->SaveSnapshot(snapshot).ok());
  for (int full = 0; full < World().size(); ++full) {
    for (int allocations = 0; allocations < 4; ++allocations) {
      const auto fail_after = [&] {
        OnRank(full, [left = allocations](size_t) mutable { return left-- > 0; });
      };
      RetrievalTableOptions options;
      options.capacity = kItems;
      fail_after();
      ExpectFull(RetrievalTable::Create(group_, *model_, {}, options).status());
      fail_after();
      ExpectFull(RetrievalTable::Build(group_, *model_, items_, options).status());
      fail_after();
      ExpectFull(RetrievalTable::LoadSnapshot(group_, *model_, snapshot, options).status());
      ExpectSame(Search(*before, queries_, Best(20)), expected);
    }
    NoRank();
    ExpectSame(Search(*Build(group_, *model_, items_), queries_, Best(20)), expected);
  }
}

TEST_F(RetrievalFullRankTest, AServiceAnswersTheOthers) {
  const auto expected = Search(*Build(group_, *model_, items_), queries_, Best(20));
  for (int full = 0; full < World().size(); ++full) {
    const auto table = Build(group_, *model_, items_);
    // The first search finds no memory, the next ones do.
    OnRank(full, [left = 1](size_t) mutable { return left-- <= 0; });
    RetrievalService service(group_, {.max_batch = 1});
    service.AddTable(table.get());
    if (World().rank() > 0) {
      service.Follow();
      continue;
    }
    std::vector<RetrievalAnswer> answers;
    for (const RetrievalQuery& query : queries_) {
      RetrievalRequest request;
      request.query = query;
      request.options = Best(20);
      request.done = [&](RetrievalAnswer answer) { answers.push_back(std::move(answer)); };
      ASSERT_TRUE(service.Submit(std::move(request)).ok());
    }
    service.Stop();
    service.Run();
    service.Finish();
    ASSERT_EQ(answers.size(), queries_.size());
    EXPECT_EQ(answers[0].status.code(), absl::StatusCode::kResourceExhausted) << answers[0].status;
    ExpectSame({answers.begin() + 1, answers.end()}, {expected.begin() + 1, expected.end()});
  }
}

#endif

}  // namespace
}  // namespace trireme
