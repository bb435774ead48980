// Building, updating and saving tables: an updated table equals one built anew, a snapshot comes
// back on any number of ranks, and what is wrong with a file is said in one line. Run on 1 to 4
// ranks.
#include "runtime/retrieval_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/runtime/retrieval_fixture.h"

namespace trireme {
namespace {

constexpr int64_t kDim = 10;

RetrievalOptions Pruned(int64_t k) {
  RetrievalOptions options;
  options.k = k;
  return options;
}

class RetrievalTableTest : public RetrievalTest {
 protected:
  std::string Items(const std::string& name, const TestItems& items) {
    return File(name, [&](const std::string& path) { WriteItems(items, path); });
  }
  std::string BuildError(const MolModel& model, const std::string& path,
                         const RetrievalTableOptions& options = {}) {
    return std::string(RetrievalTable::Build(job_, model, path, options).status().message());
  }
};

std::vector<float> Row(uint64_t seed) {
  std::vector<float> row(kDim);
  for (int64_t k = 0; k < kDim; ++k) row[k] = static_cast<float>(RandomValue(seed, k));
  return row;
}

// What a table should hold after some updates, as the file one would build it from.
class ExpectedTable {
 public:
  explicit ExpectedTable(const TestItems& items) : names_(items.attribute_names) {
    for (int64_t i = 0; i < items.count(); ++i) {
      const auto row = items.embeddings.begin() + i * kDim;
      rows_.push_back({items.ids[i], {row, row + kDim}, items.attributes[i]});
    }
  }
  void Upsert(int64_t id, const std::vector<float>& row, uint64_t attribute) {
    for (auto& existing : rows_) {
      if (existing.id != id) continue;
      existing.row = row, existing.attribute = attribute;
      return;
    }
    rows_.push_back({id, row, attribute});
  }
  void Delete(int64_t id) {
    std::erase_if(rows_, [&](const auto& row) { return row.id == id; });
  }
  TestItems Items() const {
    TestItems items;
    items.dim = kDim;
    items.attribute_names = names_;
    for (const auto& row : rows_) items.Append(row.id, row.row, row.attribute);
    return items;
  }

 private:
  struct Entry {
    int64_t id;
    std::vector<float> row;
    uint64_t attribute;
  };
  std::vector<Entry> rows_;
  std::vector<std::string> names_;
};

TEST_F(RetrievalTableTest, UpdatesEqualARebuild) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(300, kDim, 21, true);
  const std::string path = Items("items.safetensors", items);
  ExpectedTable expected(items);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kInt8}) {
    expected = ExpectedTable(items);
    RetrievalTableOptions options;
    options.storage = storage;
    options.capacity = 340;
    options.means = true;
    const auto table = Build(job_, *model, path, options);
    EXPECT_EQ(table->capacity(), 340);
    for (int step = 0; step < 12; ++step) {
      RetrievalItems batch;
      for (int i = 0; i < 9; ++i) {
        const uint64_t draw = step * 100 + i;
        const bool known = i % 3 != 0;
        const int64_t id = known ? items.ids[(draw * 37) % 300] : 5'000'000 + (draw % 40);
        if (std::count(batch.ids.begin(), batch.ids.end(), id) > 0) continue;
        const std::vector<float> row = Row(1000 + draw);
        batch.ids.push_back(id);
        batch.embeddings.insert(batch.embeddings.end(), row.begin(), row.end());
        batch.attributes.push_back(draw % 16);
        expected.Upsert(id, row, draw % 16);
      }
      ASSERT_TRUE(table->Upsert(batch).ok());
      const std::vector<int64_t> gone = {items.ids[(step * 53) % 300],
                                         5'000'000 + (step * 300) % 40, 424242};
      for (const int64_t id : gone) expected.Delete(id);
      EXPECT_LE(table->Delete(gone), 2);
      const std::string again =
          Items("again" + std::to_string(step) + (storage == MolStorage::kF32 ? "a" : "b") +
                    ".safetensors",
                expected.Items());
      RetrievalTableOptions rebuilt_options = options;
      const auto rebuilt = Build(alone_, *model, again, rebuilt_options);
      EXPECT_EQ(table->size(), rebuilt->size());
      std::vector<RetrievalQuery> queries = Queries(*model, 5, 31 + step);
      queries[2].filter = "a & !b";
      ExpectSame(Search(*table, queries, Pruned(60)), Search(*rebuilt, queries, Pruned(60)));
      RetrievalOptions two = Pruned(20);
      two.mode = RetrievalMode::kTwoStage;
      two.average_k = 40;
      two.each_k = 5;
      ExpectSame(Search(*table, queries, two), Search(*rebuilt, queries, two));
    }
  }
}

TEST_F(RetrievalTableTest, ADeletedItemNeverComesBack) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(64, kDim, 22);
  const auto table = Build(job_, *model, Items("items.safetensors", items));
  const std::vector<RetrievalQuery> queries = Queries(*model, 3, 23);
  const auto before = Search(*table, queries, Pruned(64));
  EXPECT_EQ(table->Delete({before[0].ids[0], before[1].ids[0]}), 2);
  EXPECT_EQ(table->Delete({before[0].ids[0]}), 0);
  for (const RetrievalAnswer& answer : Search(*table, queries, Pruned(64))) {
    EXPECT_EQ(std::count(answer.ids.begin(), answer.ids.end(), before[0].ids[0]), 0);
    EXPECT_EQ(std::count(answer.ids.begin(), answer.ids.end(), -1),
              before[0].ids[0] == before[1].ids[0] ? 1 : 2);
  }
}

TEST_F(RetrievalTableTest, AFullTableChangesNothing) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(20, kDim, 24);
  RetrievalTableOptions options;
  options.capacity = 22;
  const auto table = Build(job_, *model, Items("items.safetensors", items), options);
  const std::vector<RetrievalQuery> queries = Queries(*model, 2, 25);
  const auto before = Search(*table, queries, Pruned(30));
  RetrievalItems batch;
  for (int i = 0; i < 3; ++i) {
    batch.ids.push_back(i);
    const std::vector<float> row = Row(i);
    batch.embeddings.insert(batch.embeddings.end(), row.begin(), row.end());
  }
  const auto full = table->Upsert(batch);
  EXPECT_EQ(full.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(full.status().message().find("20 of the capacity of 22 are taken"), std::string::npos);
  ExpectSame(Search(*table, queries, Pruned(30)), before);
  batch.ids[2] = items.ids[4];  // a known one needs no room
  EXPECT_TRUE(table->Upsert(batch).ok());
  EXPECT_EQ(table->size(), 22);
  batch.ids = {7, 7, 8};
  EXPECT_NE(table->Upsert(batch).status().message().find("7 appears more than once"),
            std::string::npos);
  batch.embeddings.pop_back();
  EXPECT_NE(table->Upsert(batch).status().message().find("item_dim 10"), std::string::npos);
}

TEST_F(RetrievalTableTest, ItemsThatAreNotFiniteAreCountedAndNeverAnswered) {
  const auto model = Model(SmallHead());
  TestItems items = RandomItems(100, kDim, 26);
  const auto whole = Build(alone_, *model, Items("good.safetensors", items));
  items.embeddings[5 * kDim + 3] = NAN;
  items.embeddings[6 * kDim] = INFINITY;
  items.embeddings[99 * kDim + 9] = -INFINITY;
  const auto table = Build(job_, *model, Items("bad.safetensors", items));
  EXPECT_EQ(table->not_finite(), 3);
  EXPECT_EQ(table->size(), 100);
  const std::vector<RetrievalQuery> queries = Queries(*model, 3, 27);
  const auto answers = Search(*table, queries, Pruned(100));
  const auto all = Search(*whole, queries, Pruned(100));
  for (size_t b = 0; b < queries.size(); ++b) {
    std::vector<int64_t> expected;
    for (const int64_t id : all[b].ids) {
      if (id != items.ids[5] && id != items.ids[6] && id != items.ids[99]) expected.push_back(id);
    }
    expected.resize(100, -1);
    EXPECT_EQ(answers[b].ids, expected);
  }
  // A good row in its place is answered again.
  RetrievalItems fixed{{items.ids[5]}, Row(1), {}};
  EXPECT_EQ(*table->Upsert(fixed), 0);
  EXPECT_EQ(table->not_finite(), 2);
}

TEST_F(RetrievalTableTest, SnapshotsComeBackOnAnyNumberOfRanks) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(2500, kDim, 28, true);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    RetrievalTableOptions options;
    options.storage = storage;
    options.capacity = 2600;
    options.means = storage == MolStorage::kInt8;
    const auto table = Build(job_, *model, Items("items.safetensors", items), options);
    table->Delete({items.ids[7], items.ids[2000]});
    RetrievalItems added{{1}, Row(3), {5}};
    ASSERT_TRUE(table->Upsert(added).ok());
    std::vector<RetrievalQuery> queries = Queries(*model, 4, 29);
    queries[1].filter = "(a | b)";
    const std::string dir = dir_ + "/snapshot";
    for (int round = 0; round < 2; ++round) ASSERT_TRUE(table->SaveSnapshot(dir).ok());
    const auto expected = Search(*table, queries, Pruned(80));
    for (const RetrievalGroup& group : {job_, alone_}) {
      const auto loaded = RetrievalTable::LoadSnapshot(group, *model, dir, {});
      ASSERT_TRUE(loaded.ok()) << loaded.status();
      EXPECT_EQ((*loaded)->size(), 2499);
      EXPECT_EQ((*loaded)->capacity(), 2600);
      ExpectSame(Search(**loaded, queries, Pruned(80)), expected);
      // Goes on where the saved one was: a new item comes after all others.
      RetrievalItems more{{2}, Row(3), {5}};
      ASSERT_TRUE((*loaded)->Upsert(more).ok());
    }
    World().Barrier();
    // No rows of the first round are left.
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(dir)) {
      files += entry.path().extension() == ".bin" ? 1 : 0;
    }
    EXPECT_EQ(files, World().size());
    World().Barrier();
  }
}

TEST_F(RetrievalTableTest, ABrokenSnapshotIsNamedAndAnInterruptedOneLeavesTheOld) {
  const auto model = Model(SmallHead());
  const auto table = Build(job_, *model, Items("items.safetensors", RandomItems(1500, kDim, 30)));
  const std::string dir = dir_ + "/snapshot";
  const auto rows_file = [&] {
    for (const auto& entry : std::filesystem::directory_iterator(dir)) {
      const std::string name = entry.path().filename().string();
      if (name.find("-00000-of-") != std::string::npos) return entry.path().string();
    }
    return std::string();
  };
  const auto error = [&] {
    World().Barrier();
    const std::string message(
        RetrievalTable::LoadSnapshot(job_, *model, dir, {}).status().message());
    World().Barrier();
    return message;
  };
  const auto on_rank_0 = [&](auto&& work) {
    World().Barrier();
    if (World().rank() == 0) work();
  };
  EXPECT_NE(error().find("table.json"), std::string::npos);  // none there yet
  ASSERT_TRUE(table->SaveSnapshot(dir).ok());
  // What a job leaves that dies before its table.json is renamed.
  on_rank_0([&] {
    std::ofstream(dir + "/table.json.partial") << "{";
    std::ofstream(dir + "/rows-000002-00000-of-00001.bin") << "half a fi";
  });
  EXPECT_EQ(error(), "");
  on_rank_0([&] { std::filesystem::remove(dir + "/rows-000002-00000-of-00001.bin"); });
  World().Barrier();
  const std::string path = rows_file();
  char was = 0;
  on_rank_0([&] {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(1000);
    was = static_cast<char>(file.get());
    file.seekp(1000);
    file.put(static_cast<char>(was ^ 4));
  });
  EXPECT_NE(error().find("the checksum of rows 0 to"), std::string::npos);
  on_rank_0([&] {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(1000);
    file.put(was);
  });
  EXPECT_EQ(error(), "");
  on_rank_0([&] { std::filesystem::resize_file(path, 5000); });
  EXPECT_NE(error().find("has 5000 bytes"), std::string::npos);
  ASSERT_TRUE(table->SaveSnapshot(dir).ok());
  EXPECT_EQ(error(), "");
  const std::string other =
      File("other", [&](const std::string& path) { WriteRandomHead(SmallHead(), path, 99); });
  const auto other_model = MolModel::Load(other, device_.stream());
  EXPECT_NE(RetrievalTable::LoadSnapshot(job_, **other_model, dir, {})
                .status()
                .message()
                .find("another model"),
            std::string::npos);
  RetrievalTableOptions small;
  small.capacity = 10;
  EXPECT_EQ(RetrievalTable::LoadSnapshot(job_, *model, dir, small).status().code(),
            absl::StatusCode::kResourceExhausted);
  on_rank_0([&] {
    std::ifstream in(dir + "/table.json");
    std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const size_t at = text.find("\"next_order\": 1500");
    ASSERT_NE(at, std::string::npos);
    text.replace(at, 18, "\"next_order\": 1501");
    std::ofstream(dir + "/table.json") << text;
  });
  EXPECT_NE(error().find("table.json: is corrupt"), std::string::npos);
}

// table.json as the program before wrote it. The checksum is that of runtime/retrieval_snapshot.cc.
void WriteVersion(const std::string& path, int version) {
  nlohmann::ordered_json manifest = nlohmann::ordered_json::parse(std::ifstream(path));
  manifest["version"] = version;
  manifest.erase("checksum");
  const std::string body = manifest.dump();
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < body.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, body.data() + i, std::min<size_t>(8, body.size() - i));
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;
  }
  manifest["checksum"] = absl::StrFormat("%016x", hash);
  std::ofstream(path) << manifest.dump(2) + "\n";
}

TEST_F(RetrievalTableTest, SnapshotsOfOtherVersionsAreReadOrRefused) {
  const auto model = Model(SmallHead());
  const std::string path = Items("items.safetensors", RandomItems(300, kDim, 35));
  const std::vector<RetrievalQuery> queries = Queries(*model, 3, 36);
  for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
    RetrievalTableOptions options;
    options.storage = storage;
    const auto table = Build(job_, *model, path, options);
    const std::string dir = dir_ + "/snapshot";
    ASSERT_TRUE(table->SaveSnapshot(dir).ok());
    const auto load = [&](int version) {
      World().Barrier();
      if (World().rank() == 0) WriteVersion(dir + "/table.json", version);
      World().Barrier();
      return RetrievalTable::LoadSnapshot(job_, *model, dir, {});
    };
    EXPECT_NE(load(3).status().message().find("has version 3; this program reads versions 1 to 2"),
              std::string::npos);
    const auto old = load(1);
    if (storage == MolStorage::kInt8) {
      EXPECT_NE(old.status().message().find("has version 1, whose int8 rows"), std::string::npos);
      continue;
    }
    ASSERT_TRUE(old.ok()) << old.status();
    ExpectSame(Search(**old, queries, Pruned(20)), Search(*table, queries, Pruned(20)));
  }
}

TEST_F(RetrievalTableTest, BadFilesAreNamed) {
  const auto model = Model(SmallHead());
  TestItems items = RandomItems(200, kDim, 33);
  RetrievalTableOptions small;
  small.capacity = 199;
  EXPECT_NE(BuildError(*model, Items("items.safetensors", items), small)
                .find("has 200 items; the table's capacity is 199"),
            std::string::npos);
  items.ids[150] = items.ids[3];
  EXPECT_NE(BuildError(*model, Items("twice.safetensors", items))
                .find("item_ids: " + std::to_string(items.ids[3]) + " appears more than once"),
            std::string::npos);
  items.ids[150] = -4;
  EXPECT_NE(BuildError(*model, Items("negative.safetensors", items)).find("row 150 has the id -4"),
            std::string::npos);
  EXPECT_NE(BuildError(*model, Items("dim.safetensors", RandomItems(5, 11, 1)))
                .find("items have 11 elements; the model's item_dim is 10"),
            std::string::npos);
  EXPECT_NE(BuildError(*model, dir_ + "/nowhere.npy").find("nowhere.npy"), std::string::npos);
}

TEST_F(RetrievalTableTest, ReadsNumpyMatrices) {
  const auto model = Model(SmallHead());
  const TestItems items = RandomItems(90, kDim, 34);
  const std::string npy = File("items.npy", [&](const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    out << NpyHeaderBytes("<f4", {90, kDim});
    out.write(reinterpret_cast<const char*>(items.embeddings.data()), items.embeddings.size() * 4);
  });
  const auto from_npy = Build(job_, *model, npy);
  const auto from_tensors = Build(job_, *model, Items("items.safetensors", items));
  const std::vector<RetrievalQuery> queries = Queries(*model, 3, 35);
  const auto a = Search(*from_npy, queries, Pruned(20));
  const auto b = Search(*from_tensors, queries, Pruned(20));
  for (size_t i = 0; i < queries.size(); ++i) {
    EXPECT_EQ(a[i].scores, b[i].scores);
    EXPECT_EQ(items.ids[a[i].ids[0]], b[i].ids[0]);
  }
  const auto error = [&](const std::string& bytes) {
    const std::string path = File("broken.npy", [&](const std::string& path) {
      std::ofstream(path, std::ios::binary) << bytes;
    });
    const std::string message = BuildError(*model, path);
    World().Barrier();
    return message;
  };
  const std::string good = NpyHeaderBytes("<f4", {2, kDim}) + std::string(80, '\0');
  EXPECT_EQ(error(good), "");
  EXPECT_NE(error(good.substr(0, good.size() - 1)).find("is cut short"), std::string::npos);
  EXPECT_NE(error("x").find("is no .npy file"), std::string::npos);
  EXPECT_NE(error(NpyHeaderBytes("<i4", {2, kDim}) + std::string(80, '\0')).find("\"<i4\""),
            std::string::npos);
  EXPECT_NE(error(NpyHeaderBytes("<f4", {20}) + std::string(80, '\0')).find("1 dimensions"),
            std::string::npos);
  EXPECT_NE(error(NpyHeaderBytes("<f4", {1LL << 62, kDim})).find("is cut short"),
            std::string::npos);
}

}  // namespace
}  // namespace trireme
