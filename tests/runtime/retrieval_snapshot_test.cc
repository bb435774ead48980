// A process that is killed while it saves a snapshot leaves the old one whole, wherever it was: the
// kernel ends it (SIGXFSZ) when a file of its grows beyond a limit, for many limits.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

#include "models/mol_model.h"
#include "parallel/communicator.h"
#include "runtime/retrieval_search.h"
#include "tests/retrieval_files.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr int64_t kItems = 6;

// Long names, so that table.json grows beyond the rows: it too is broken off in the middle.
std::vector<std::string> LongNames() {
  std::vector<std::string> names;
  for (int i = 0; i < 20; ++i)
    names.push_back("attribute:" + std::string(100, 'a') + char('a' + i));
  return names;
}

RetrievalItems Items(uint64_t seed) {
  RetrievalItems items;
  for (int64_t i = 0; i < kItems; ++i) {
    items.ids.push_back(i);
    for (int64_t k = 0; k < 10; ++k)
      items.embeddings.push_back(static_cast<float>(RandomValue(seed, i * 10 + k)));
  }
  return items;
}

// How a child ends that saves with such a limit on the size of files.
int SaveWithLimit(const RetrievalTable& table, const std::string& dir, rlim_t bytes) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_DFL);
    const rlimit core{0, 0}, limit{bytes, bytes};
    setrlimit(RLIMIT_CORE, &core);
    setrlimit(RLIMIT_FSIZE, &limit);
    _exit(table.SaveSnapshot(dir).ok() ? 0 : 1);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  return status;
}

TEST(RetrievalSnapshotTest, AKillLeavesTheOldOneWhole) {
  const TestDevice device(1);  // no threads that a fork would lose
  const ScratchDir scratch;
  const auto self = NewSelfCommunicator();
  const RetrievalGroup group{nullptr, self.get(), &device.stream()};
  WriteRandomHead(SmallHead(), scratch.path() + "/head", 1);
  const auto model = MolModel::Load(scratch.path() + "/head", device.stream()).value();
  RetrievalTableOptions options;
  options.capacity = kItems;
  const auto table = RetrievalTable::Create(group, *model, LongNames(), options).value();
  const std::string dir = scratch.path() + "/snapshot";
  ASSERT_TRUE(table->Upsert(Items(1)).ok());
  ASSERT_TRUE(table->SaveSnapshot(dir).ok());

  std::vector<RetrievalQuery> queries(1);
  for (int64_t k = 0; k < 12; ++k)
    queries[0].embedding.push_back(static_cast<float>(RandomValue(9, k)));
  RetrievalOptions search;
  search.k = kItems;
  const auto answer = [&](const RetrievalTable& from) {
    return SearchTable(from, queries, search).value()[0];
  };
  const RetrievalAnswer old = answer(*table);
  ASSERT_TRUE(table->Upsert(Items(2)).ok());
  const RetrievalAnswer changed = answer(*table);
  ASSERT_NE(old.scores, changed.scores);
  uintmax_t largest = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir))
    largest = std::max(largest, entry.file_size());
  ASSERT_EQ(largest, std::filesystem::file_size(dir + "/table.json"));
  int killed = 0;
  for (uintmax_t limit = 0; limit < largest; limit += 61, ++killed) {
    const int status = SaveWithLimit(*table, dir, limit);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ)
        << "a limit of " << limit << " bytes: " << status;
    const auto loaded = RetrievalTable::LoadSnapshot(group, *model, dir, {});
    ASSERT_TRUE(loaded.ok()) << "killed at " << limit << " bytes: " << loaded.status();
    ASSERT_EQ(answer(**loaded).scores, old.scores) << "killed at " << limit << " bytes";
  }
  EXPECT_GT(killed, 20);
  // What the killed ones left does not hinder the next.
  ASSERT_EQ(SaveWithLimit(*table, dir, RLIM_INFINITY), 0);
  EXPECT_EQ(answer(*RetrievalTable::LoadSnapshot(group, *model, dir, {}).value()).scores,
            changed.scores);
}

}  // namespace
}  // namespace trireme
