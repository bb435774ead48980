// Memory of the device in retrieval: a table takes all that its updates need when it is made, a
// search takes what it needs before it begins, and where a device lacks it that is a status which
// names the owner.
#include <thread>

#include "models/mol_model.h"
#include "parallel/communicator.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/retrieval_search.h"
#include "tests/retrieval_files.h"
#include "tests/runtime/failing_device.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

constexpr int64_t kItems = 400, kDim = 10, kQueryDim = 12;

std::vector<float> Row(uint64_t seed, int64_t dim) {
  std::vector<float> row(dim);
  for (int64_t k = 0; k < dim; ++k) row[k] = static_cast<float>(RandomValue(seed, k));
  return row;
}

RetrievalItems SomeItems(int64_t first, int64_t count, uint64_t seed) {
  RetrievalItems items;
  for (int64_t i = 0; i < count; ++i) {
    items.ids.push_back(first + i);
    const std::vector<float> row = Row(seed + first + i, kDim);
    items.embeddings.insert(items.embeddings.end(), row.begin(), row.end());
  }
  return items;
}

std::vector<RetrievalQuery> SomeQueries() {
  std::vector<RetrievalQuery> queries(3);
  for (size_t b = 0; b < queries.size(); ++b) queries[b].embedding = Row(70 + b, kQueryDim);
  queries[1].exclude_ids = {3, 5};
  return queries;
}

std::vector<RetrievalOptions> AllOptions() {
  std::vector<RetrievalOptions> all(5);
  all[0].mode = RetrievalMode::kExact;
  all[1].mode = RetrievalMode::kPruned;
  for (size_t i = 2; i < all.size(); ++i) {
    all[i].mode = RetrievalMode::kTwoStage;
    all[i].first_stage = static_cast<FirstStage>(i - 2);
    all[i].average_k = 60;
    all[i].each_k = 20;
    all[i].exact_or_certified = true;
  }
  for (RetrievalOptions& options : all) options.k = 30;
  return all;
}

// A device, a head on it, and a group of this rank alone.
struct Place {
  explicit Place(std::unique_ptr<Device> device_in) : device(std::move(device_in)) {
    stream = device->NewStream().value();
    group = {nullptr, communicator.get(), stream.get()};
    WriteRandomHead(SmallHead(), scratch.path() + "/head", 1);
    model = MolModel::Load(scratch.path() + "/head", *stream).value();
  }
  absl::StatusOr<std::unique_ptr<RetrievalTable>> Table() {
    RetrievalTableOptions options;
    options.capacity = kItems;
    options.storage = MolStorage::kInt8;  // with means it has most to allocate
    options.means = true;
    return RetrievalTable::Create(group, *model, {}, options);
  }
  ItemShardOptions ShardOptions() const {
    ItemShardOptions options;
    options.capacity = kItems;
    return options;
  }

  ScratchDir scratch;
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> communicator = NewSelfCommunicator();
  RetrievalGroup group;
  std::unique_ptr<MolModel> model;
};

std::unique_ptr<Device> Cpu() { return OpenDevice({.name = "cpu", .threads = 2}).value(); }

void ExpectUpdatesAndSearchesTakeNothing(Place& place) {
  const auto table = place.Table().value();
  const int64_t made = place.device->allocated_bytes();
  EXPECT_GT(made, 0) << "this device does not count";
  ASSERT_TRUE(table->Upsert(SomeItems(0, 300, 1)).ok());
  ASSERT_TRUE(table->Upsert(SomeItems(250, kItems - 250, 2)).ok());
  EXPECT_EQ(table->Delete({1, 2}), 2);
  ASSERT_TRUE(table->Upsert(SomeItems(1, 2, 3)).ok());
  EXPECT_EQ(place.device->allocated_bytes(), made) << "an update took memory";
  const auto search = [&] {
    for (const RetrievalOptions& options : AllOptions())
      ASSERT_TRUE(SearchTable(*table, SomeQueries(), options).ok());
  };
  search();
  const int64_t warm = place.device->allocated_bytes();
  search();
  EXPECT_EQ(place.device->allocated_bytes(), warm) << "a search took memory once more";
}

TEST(RetrievalMemoryTest, UpdatesTakeNothing) {
  Place place(Cpu());
  ExpectUpdatesAndSearchesTakeNothing(place);
}

TEST(RetrievalMemoryTest, ThePlanIsWhatADeviceGives) {
  Place place(Cpu());
  const int64_t before = place.device->allocated_bytes();
  const auto shard = ItemShard::Create(*place.model, *place.stream, place.ShardOptions()).value();
  const ItemShardBytes& bytes = shard->bytes();
  EXPECT_GT(bytes.projection, 0);
  // Places are ids' memory on the device.
  const int64_t places = shard->mask_words() * kMolBlockRows * int64_t{sizeof(uint32_t)};
  EXPECT_EQ(place.device->allocated_bytes() - before, bytes.items + bytes.projection + places);
}

// Of the published heads: a table takes 5 % more than components and gates, at the most. These are
// 4 bytes a value for f32 and 2 for bf16; for int8 one a component and still two a gate value.
TEST(RetrievalMemoryTest, ATableTakesLittleMoreThanItsValues) {
  const int64_t sizes[][3] = {{8, 4, 64}, {8, 4, 128}, {8, 8, 32}};
  const std::unique_ptr<Device> device = Cpu();
  const auto stream = device->NewStream().value();
  for (const auto& [pq, px, d] : sizes) {
    MolConfig config = SmallHead();
    config.query_components = pq;
    config.item_components = px;
    config.component_dim = d;
    const ScratchDir scratch;
    WriteRandomHead(config, scratch.path(), 1);
    const auto model = MolModel::Load(scratch.path(), *stream).value();
    ItemShardOptions options;
    options.capacity = 100'000;
    for (const MolStorage storage : {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8}) {
      options.storage = storage;
      const int64_t table = ItemShard::PlanBytes(*model, options, /*host_memory=*/true).table();
      const int64_t component = storage == MolStorage::kF32    ? 4
                                : storage == MolStorage::kBF16 ? 2
                                                               : 1;
      const int64_t values = px * d * component + std::max<int64_t>(2, component) * pq * px;
      EXPECT_LE(static_cast<double>(table), 1.05 * 100'000 * static_cast<double>(values))
          << pq << "x" << px << "x" << d;
    }
  }
}

// Whichever thread's turn it is: each item is what it would be in a table of its own.
TEST(RetrievalMemoryTest, PutsOfSeveralThreadsDoNotMix) {
  Place place(Cpu());
  const RetrievalItems items = SomeItems(0, kItems, 5);
  std::vector<uint32_t> order(kItems);
  for (int64_t i = 0; i < kItems; ++i) order[i] = static_cast<uint32_t>(i);
  const auto put = [&](ItemShard& shard, Stream& stream, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 10) {
      const auto bad = shard.Put(stream, {.embeddings = items.embeddings.data() + i * kDim,
                                          .ids = items.ids.data() + i,
                                          .order = order.data() + i,
                                          .count = 10});
      ASSERT_EQ(bad.value(), 0);
    }
  };
  const auto together =
      ItemShard::Create(*place.model, *place.stream, place.ShardOptions()).value();
  const auto alone = ItemShard::Create(*place.model, *place.stream, place.ShardOptions()).value();
  put(*alone, *place.stream, 0, kItems);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const auto stream = place.device->NewStream().value();
      put(*together, *stream, kItems / 4 * t, kItems / 4 * (t + 1));
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto row = [&](const ItemShard& shard, int64_t id) {
    std::vector<char> bytes(shard.row_bytes());
    ItemShard::BlockWindow window(shard, *place.stream);
    EXPECT_TRUE(shard.ExportRow(window, shard.Find(id).value(), bytes.data()).ok());
    return bytes;
  };
  for (const int64_t id : items.ids) ASSERT_EQ(row(*together, id), row(*alone, id)) << id;
}

TEST(RetrievalMemoryTest, AnErrorOfTheStreamIsAStatus) {
  Place place(Cpu());
  std::atomic<bool> fail = false;
  FailingDevice failing(Cpu(), &fail);
  const auto stream = failing.NewStream().value();
  const auto shard = ItemShard::Create(*place.model, *stream, place.ShardOptions()).value();
  const RetrievalItems items = SomeItems(0, 10, 1);
  const std::vector<uint32_t> order(10);
  const ItemShard::Items ten{.embeddings = items.embeddings.data(),
                             .ids = items.ids.data(),
                             .order = order.data(),
                             .count = 10};
  fail = true;
  const auto failed = shard->Put(*stream, ten);
  EXPECT_EQ(failed.status().message(), FailingDevice::kError);
  EXPECT_EQ(shard->size(), 0) << "items were entered that could not be projected";
  EXPECT_TRUE(shard->Put(*stream, ten).ok());

  std::vector<char> row(shard->row_bytes());
  ItemShard::BlockWindow window(*shard, *stream);
  fail = true;
  EXPECT_EQ(shard->ExportRow(window, 0, row.data()).message(), FailingDevice::kError);
  ASSERT_TRUE(shard->ExportRow(window, 0, row.data()).ok());
  EXPECT_FALSE(shard->ImportRow(window, row.data()).value()) << "its id is there";
  ASSERT_TRUE(shard->Erase(0));
  ItemShard::BlockWindow other(*shard, *stream);
  fail = true;
  EXPECT_EQ(shard->ImportRow(other, row.data()).status().message(), FailingDevice::kError);
}

// Of all ranks, as a snapshot is: nothing of it is read with a device that is lost.
TEST(RetrievalMemoryTest, AnErrorOfTheStreamEndsASnapshot) {
  Place place(Cpu());
  std::atomic<bool> fail = false;
  FailingDevice failing(Cpu(), &fail);
  const auto stream = failing.NewStream().value();
  const auto self = NewSelfCommunicator();
  const RetrievalGroup group{nullptr, self.get(), stream.get()};
  RetrievalTableOptions options;
  options.capacity = kItems;
  const auto table = RetrievalTable::Create(group, *place.model, {}, options).value();
  ASSERT_TRUE(table->Upsert(SomeItems(0, kItems, 1)).ok());
  const ScratchDir scratch;
  const std::string dir = scratch.path() + "/snapshot";
  fail = true;
  EXPECT_EQ(table->SaveSnapshot(dir).message(), FailingDevice::kError);
  ASSERT_TRUE(table->SaveSnapshot(dir).ok());
  fail = true;
  EXPECT_EQ(RetrievalTable::LoadSnapshot(group, *place.model, dir, {}).status().message(),
            FailingDevice::kError);
  EXPECT_TRUE(RetrievalTable::LoadSnapshot(group, *place.model, dir, {}).ok());
}

#if defined(TRIREME_HOST_CUDA)

// Memory that the host cannot touch: here arguments need memory too.
class RetrievalDeviceMemoryTest : public ::testing::Test {
 protected:
  ~RetrievalDeviceMemoryTest() override { HostCudaTestHooks().allocating = nullptr; }
  static absl::Status NoMemory() { return absl::ResourceExhaustedError("the device is full"); }
  Place place_{NewHostCudaDevice(/*hidden=*/true)};
};

TEST_F(RetrievalDeviceMemoryTest, UpdatesTakeNothing) {
  ExpectUpdatesAndSearchesTakeNothing(place_);
}

TEST_F(RetrievalDeviceMemoryTest, ATableThatDoesNotFitNamesItsOwners) {
  int failures = 0;
  for (bool made = false; !made; ++failures) {
    ASSERT_LT(failures, 20);
    int left = failures;
    HostCudaTestHooks().allocating = [&left](size_t) {
      return left-- > 0 ? absl::OkStatus() : NoMemory();
    };
    const auto table = place_.Table();
    made = table.ok();
    if (made) break;
    EXPECT_EQ(table.status().code(), absl::StatusCode::kResourceExhausted);
    for (const char* part :
         {"retrieval table: 400 items need ", "(items ", ", ids ", ", attributes ", ", projection ",
          "): use more ranks, bf16 or int8: the device is full"}) {
      EXPECT_NE(table.status().message().find(part), std::string::npos) << table.status();
    }
  }
  // Components, gates, places, scales of both, means and their scales, what updates work in.
  EXPECT_EQ(failures, 8);
}

TEST_F(RetrievalDeviceMemoryTest, ASearchWithoutMemoryFailsAndNothingElse) {
  const auto table = place_.Table().value();
  ASSERT_TRUE(table->Upsert(SomeItems(0, kItems, 1)).ok());
  for (const RetrievalOptions& options : AllOptions()) {
    // The first of them finds no memory at all, the others too little.
    HostCudaTestHooks().allocating = [](size_t) { return NoMemory(); };
    const auto all_failed = SearchTable(*table, SomeQueries(), options);
    ASSERT_TRUE(all_failed.ok()) << all_failed.status();
    for (const RetrievalAnswer& failed : *all_failed) {
      EXPECT_EQ(failed.status.code(), absl::StatusCode::kResourceExhausted);
      EXPECT_FALSE(failed.exact);
      for (const char* part :
           {"retrieval search: a batch of 1 with k 30 needs ", "(queries ", ", masks ",
            ", answers ", ", kernels ", "the device is full\nrank 0 (", ") holds:\n  weights ",
            "\n  items "}) {
        EXPECT_NE(failed.status.message().find(part), std::string::npos) << failed.status;
      }
    }
    EXPECT_TRUE(table->Upsert(SomeItems(0, 10, 1)).ok()) << "an update needs none";
    HostCudaTestHooks().allocating = nullptr;
    const auto answers = SearchTable(*table, SomeQueries(), options);
    ASSERT_TRUE(answers.ok()) << answers.status();
    for (const RetrievalAnswer& answer : *answers) EXPECT_TRUE(answer.exact);
    table->search_memory().Take(*place_.device, 0).value();  // and lets it go
  }
}

// One query asks for more than there is; those beside it, and those after it, have what they had.
TEST_F(RetrievalDeviceMemoryTest, AQueryThatDoesNotFitFailsAlone) {
  const auto table = place_.Table().value();
  ASSERT_TRUE(table->Upsert(SomeItems(0, kItems, 1)).ok());
  const RetrievalOptions options = AllOptions()[1];
  std::vector<RetrievalQuery> queries = SomeQueries();
  const std::vector<RetrievalAnswer> alone = SearchTable(*table, queries, options).value();
  const int64_t warm = place_.device->allocated_bytes();
  queries[1].exclude_ids.resize(1'000'000, 5);  // 4 MB of slots
  size_t largest = 0;
  HostCudaTestHooks().allocating = [&largest](size_t bytes) {
    largest = std::max(largest, bytes);
    return bytes > 4'000'000 ? NoMemory() : absl::OkStatus();
  };
  const std::vector<RetrievalAnswer> answers = SearchTable(*table, queries, options).value();
  EXPECT_GT(largest, 4'000'000u);
  EXPECT_EQ(answers[1].status.code(), absl::StatusCode::kResourceExhausted);
  for (const size_t i : {size_t{0}, size_t{2}}) {
    EXPECT_TRUE(answers[i].status.ok()) << answers[i].status;
    EXPECT_EQ(answers[i].ids, alone[i].ids);
    EXPECT_EQ(answers[i].scores, alone[i].scores);
  }
  EXPECT_GE(place_.device->allocated_bytes(), warm);
  queries[1].exclude_ids.clear();
  EXPECT_TRUE(SearchTable(*table, queries, options).value()[1].status.ok());
}

// Nothing that a replay needs is read where the host cannot read it, or taken when it runs.
TEST_F(RetrievalDeviceMemoryTest, ReplayedSearchesTakeNothingOfTheKernels) {
  const auto table = place_.Table().value();
  ASSERT_TRUE(table->Upsert(SomeItems(0, kItems, 1)).ok());
  const RetrievalOptions options = AllOptions()[1];
  const std::vector<RetrievalAnswer> eager = SearchTable(*table, SomeQueries(), options).value();
  const auto graphs =
      RetrievalGraphs::Create(*table, place_.group, {.searches = {options}, .batches = {4}})
          .value();
  table->search_memory().Take(*place_.device, 0).value();  // and lets it go
  const int64_t made = place_.device->allocated_bytes();
  const std::vector<RetrievalAnswer> replayed =
      SearchTable(*table, SomeQueries(), options, {.graphs = graphs.get()}).value();
  EXPECT_EQ(graphs->stats().replays, 1);
  EXPECT_LT(place_.device->allocated_bytes() - made, graphs->bytes());
  for (size_t i = 0; i < eager.size(); ++i) {
    EXPECT_EQ(replayed[i].ids, eager[i].ids);
    EXPECT_EQ(replayed[i].scores, eager[i].scores);
  }
}

#else
TEST(RetrievalDeviceMemoryTest, Skipped) {
  GTEST_SKIP() << "CUDA kernels in the emulator: no cuda_bf16.h";
}
#endif

}  // namespace
}  // namespace trireme
