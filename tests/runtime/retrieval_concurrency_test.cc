// Searches from several threads while items come, change and go: every answer holds whole items, a
// deleted one is not answered after its deletion, and in the end the table equals one built anew.
#include <atomic>
#include <set>
#include <thread>

#include "runtime/retrieval_search.h"
#include "tests/retrieval_files.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr int64_t kItems = 400, kDim = 10;

std::vector<float> Row(int64_t item, int version) {
  std::vector<float> row(kDim);
  for (int64_t k = 0; k < kDim; ++k)
    row[k] = static_cast<float>(RandomValue(500 + version, item * kDim + k));
  return row;
}

// A thread's own stream and communicator.
struct Searcher {
  explicit Searcher(const TestDevice& device)
      : stream(device.device().NewStream().value()),
        communicator(NewSelfCommunicator()),
        group{nullptr, communicator.get(), stream.get()} {}
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> communicator;
  RetrievalGroup group;
};

TEST(RetrievalConcurrencyTest, SearchesSeeWholeItems) {
  const TestDevice device(2);
  const ScratchDir dir;
  WriteRandomHead(SmallHead(), dir.path() + "/m", 1);
  const auto model = MolModel::Load(dir.path() + "/m", device.stream()).value();
  TestItems items;
  items.dim = kDim;
  for (int64_t i = 0; i < kItems; ++i) items.Append(i, Row(i, 0));
  WriteItems(items, dir.path() + "/items.safetensors");
  Searcher writer(device);
  const auto build = [&](const std::string& path) {
    return RetrievalTable::Build(writer.group, *model, path, {}).value();
  };
  const auto table = build(dir.path() + "/items.safetensors");

  RetrievalQuery query;
  for (int64_t k = 0; k < 12; ++k) query.embedding.push_back(static_cast<float>(RandomValue(9, k)));
  RetrievalOptions options;
  options.k = kItems;
  // The scores an item may have: of either version.
  std::vector<std::set<float>> allowed(kItems);
  const auto note = [&](const RetrievalTable& from) {
    const auto answer = SearchTable(from, {query}, options).value()[0];
    for (size_t j = 0; j < answer.ids.size(); ++j) {
      if (answer.ids[j] >= 0) allowed[answer.ids[j]].insert(answer.scores[j]);
    }
  };
  note(*table);
  TestItems changed = items;
  for (int64_t i = 0; i < kItems; ++i)
    std::copy_n(Row(i, 1).begin(), kDim, changed.embeddings.begin() + i * kDim);
  WriteItems(changed, dir.path() + "/changed.safetensors");
  note(*build(dir.path() + "/changed.safetensors"));

  std::atomic<bool> stop{false};
  std::atomic<int64_t> deleted{-1}, wrong{0}, searches{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      Searcher own(device);
      while (!stop) {
        const int64_t gone = deleted.load();
        const auto answer = SearchTable(*table, {query}, options, {.group = &own.group}).value()[0];
        for (size_t j = 0; j < answer.ids.size(); ++j) {
          const int64_t id = answer.ids[j];
          if (id < 0) continue;
          if (id <= gone || allowed[id].count(answer.scores[j]) == 0) ++wrong;
        }
        ++searches;
      }
    });
  }
  // The first 100 are deleted one after the other; of the rest every second one changes.
  for (int64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(table->Delete({i}), 1);
    deleted = i;
    const int64_t other = 100 + 2 * i;
    EXPECT_TRUE(table->Upsert({{other}, Row(other, 1), {}}).ok());
  }
  while (searches < 20) std::this_thread::yield();
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);

  TestItems final_items;
  final_items.dim = kDim;
  for (int64_t i = 100; i < kItems; ++i)
    final_items.Append(i, Row(i, i % 2 == 0 && i < 300 ? 1 : 0));
  WriteItems(final_items, dir.path() + "/final.safetensors");
  const auto rebuilt = build(dir.path() + "/final.safetensors");
  const auto a = SearchTable(*table, {query}, options).value()[0];
  const auto b = SearchTable(*rebuilt, {query}, options).value()[0];
  EXPECT_EQ(a.ids, b.ids);
  EXPECT_EQ(a.scores, b.scores);
}

}  // namespace
}  // namespace trireme
