// Batching by a clock that the test turns, and the service on 1, 2 and 4 ranks: answers of
// concurrent requests over two tables are those of a search of their own, updates keep their place.
#include "runtime/retrieval_service.h"

#include <atomic>
#include <thread>

#include "tests/runtime/retrieval_fixture.h"

namespace trireme {
namespace {

using std::chrono::microseconds;

RetrievalRequest Request(int table, int64_t k, int64_t user = 0) {
  RetrievalRequest request;
  request.table = table;
  request.options.k = k;
  request.query.user_id = user;
  return request;
}

class RetrievalBatcherTest : public ::testing::Test {
 protected:
  RetrievalBatcher::Time At(int64_t us) { return start_ + microseconds(us); }
  std::vector<int64_t> Users(const RetrievalBatcher::Work& work) {
    std::vector<int64_t> users;
    for (const RetrievalRequest& request : work.requests) users.push_back(request.query.user_id);
    return users;
  }
  RetrievalBatcher::Time start_ = std::chrono::steady_clock::now();
  RetrievalBatcher batcher_{{.max_batch = 3, .max_wait = microseconds(100), .max_queued = 6}};
};

TEST_F(RetrievalBatcherTest, WaitsForAFullBatchButNoLongerThanTheBound) {
  EXPECT_FALSE(batcher_.Due().has_value());
  ASSERT_TRUE(batcher_.Add(Request(0, 10, 1), At(0)).ok());
  ASSERT_TRUE(batcher_.Add(Request(0, 10, 2), At(60)).ok());
  EXPECT_TRUE(batcher_.Next(At(99)).empty());
  EXPECT_EQ(*batcher_.Due(), At(100));
  EXPECT_EQ(Users(batcher_.Next(At(100))), (std::vector<int64_t>{1, 2}));
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(batcher_.Add(Request(0, 10, i), At(200)).ok());
  EXPECT_EQ(Users(batcher_.Next(At(200))), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_TRUE(batcher_.Next(At(201)).empty());
  EXPECT_EQ(batcher_.queued(), 1);
}

TEST_F(RetrievalBatcherTest, OnlyTheSameTableAndOptionsGoTogether) {
  const std::pair<int, int64_t> kinds[] = {{0, 10}, {1, 10}, {0, 20}, {0, 10}, {1, 10}};
  for (int i = 0; i < 5; ++i)
    ASSERT_TRUE(batcher_.Add(Request(kinds[i].first, kinds[i].second, i), At(i)).ok());
  EXPECT_EQ(Users(batcher_.Next(At(500))), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(Users(batcher_.Next(At(500))), (std::vector<int64_t>{1, 4}));
  EXPECT_EQ(Users(batcher_.Next(At(500))), (std::vector<int64_t>{2}));
}

TEST_F(RetrievalBatcherTest, UpdatesKeepTheirPlace) {
  ASSERT_TRUE(batcher_.Add(Request(0, 10, 1), At(0)).ok());
  ASSERT_TRUE(batcher_.Add(RetrievalUpdate{}, At(1)).ok());
  ASSERT_TRUE(batcher_.Add(Request(0, 10, 2), At(2)).ok());
  // The request before the update does not wait for company that may not overtake.
  EXPECT_EQ(Users(batcher_.Next(At(3))), (std::vector<int64_t>{1}));
  EXPECT_TRUE(batcher_.Next(At(3)).update.has_value());
  EXPECT_TRUE(batcher_.Next(At(3)).empty());
  EXPECT_EQ(Users(batcher_.Next(At(102))), (std::vector<int64_t>{2}));
}

TEST_F(RetrievalBatcherTest, AFullQueueRefuses) {
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(batcher_.Add(Request(0, 10, i), At(0)).ok());
  EXPECT_EQ(batcher_.Add(Request(0, 10), At(0)).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(RetrievalTest, ConcurrentRequestsOverTwoTables) {
  const auto model = Model(SmallHead());
  const auto items = [&](const std::string& name, int64_t count, uint64_t seed) {
    return File(name,
                [&](const std::string& path) { WriteItems(RandomItems(count, 10, seed), path); });
  };
  RetrievalTableOptions options;
  options.capacity = 600;
  const auto first = Build(job_, *model, items("a.safetensors", 500, 51), options);
  const auto second = Build(job_, *model, items("b.safetensors", 300, 52), options);
  const std::vector<RetrievalQuery> queries = Queries(*model, 60, 53);
  RetrievalOptions search;
  search.k = 15;
  const std::vector<RetrievalAnswer> expected[2] = {Search(*first, queries, search),
                                                    Search(*second, queries, search)};
  RetrievalService service(job_, {.max_batch = 8, .max_wait = microseconds(200)});
  service.AddTable(first.get());
  service.AddTable(second.get());
  if (World().rank() > 0) {
    service.Follow();
    return;
  }
  std::atomic<int> good{0}, answered{0};
  std::vector<std::thread> clients;
  for (int client = 0; client < 3; ++client) {
    clients.emplace_back([&, client] {
      for (size_t i = client; i < queries.size(); i += 3) {
        RetrievalRequest request;
        request.table = static_cast<int>(i % 2);
        request.options = search;
        request.query = queries[i];
        request.done = [&, i](const RetrievalAnswer& answer) {
          const RetrievalAnswer& want = expected[i % 2][i];
          good += answer.status.ok() && answer.ids == want.ids && answer.scores == want.scores;
          ++answered;
        };
        EXPECT_TRUE(service.Submit(std::move(request)).ok());
      }
    });
  }
  std::thread stopper([&] {
    for (std::thread& client : clients) client.join();
    service.Stop();
  });
  service.Run();
  stopper.join();
  service.Finish();
  EXPECT_EQ(answered, 60);
  EXPECT_EQ(good, 60);
  EXPECT_EQ(service.stats().requests, 60);
  EXPECT_LT(service.stats().batches, 60);
  EXPECT_EQ(service.Submit(Request(0, 1)).code(), absl::StatusCode::kUnavailable);
}

TEST_F(RetrievalTest, TheServiceUpdatesInOrderAndRefusesWhatCannotBe) {
  const auto model = Model(SmallHead());
  const std::string path = File("items.safetensors", [&](const std::string& path) {
    WriteItems(RandomItems(50, 10, 54), path);
  });
  RetrievalTableOptions options;
  options.capacity = 51;
  const auto table = Build(job_, *model, path, options);
  const RetrievalQuery query = Queries(*model, 1, 55)[0];
  RetrievalService service(job_, {});
  service.AddTable(table.get());
  if (World().rank() > 0) {
    service.Follow();
    EXPECT_EQ(table->size(), 50);
    return;
  }
  std::vector<std::string> log;
  const auto ask = [&] {
    RetrievalRequest request = Request(0, 60);
    request.query = query;
    request.done = [&](const RetrievalAnswer& answer) {
      log.push_back(std::to_string(60 - std::count(answer.ids.begin(), answer.ids.end(), -1)));
    };
    EXPECT_TRUE(service.Submit(std::move(request)).ok());
  };
  const auto upsert = [&](std::vector<int64_t> ids) {
    RetrievalUpdate update;
    update.upsert.embeddings.assign(ids.size() * 10, 0.5f);
    update.upsert.ids = std::move(ids);
    update.done = [&](const absl::StatusOr<int64_t>& result) {
      log.push_back(result.ok() ? "added" : "full");
    };
    EXPECT_TRUE(service.Submit(std::move(update)).ok());
  };
  ask();
  upsert({9000000});
  ask();
  upsert({9000001});
  ask();
  RetrievalUpdate gone;
  gone.delete_ids = {9000000, 77};
  gone.done = [&](const absl::StatusOr<int64_t>& result) {
    log.push_back(std::to_string(*result));
  };
  EXPECT_TRUE(service.Submit(std::move(gone)).ok());
  ask();
  EXPECT_EQ(service.Submit(Request(1, 1)).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(service.Submit(Request(0, 99999)).code(), absl::StatusCode::kInvalidArgument);
  service.Stop();
  service.Run();
  service.Finish();
  EXPECT_EQ(log, (std::vector<std::string>{"50", "added", "51", "full", "51", "1", "50"}));
}

}  // namespace
}  // namespace trireme
