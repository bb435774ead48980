// A table in memory that the host cannot touch: build, update, snapshot and every mode of search on
// the emulated CUDA device, against the CPU's answers and against each other.
#include <cmath>

#include "models/mol_model.h"
#include "parallel/communicator.h"
#include "runtime/retrieval_search.h"
#include "tests/retrieval_files.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

constexpr int64_t kItems = 400, kQueries = 5;

// A device with a model, a table of it, and a group of this rank alone.
struct Place {
  explicit Place(std::unique_ptr<Device> device_in) : device(std::move(device_in)) {
    stream = device->NewStream().value();
    group = {nullptr, communicator.get(), stream.get()};
  }
  void Build(const std::string& head, const std::string& items, MolStorage storage) {
    model = MolModel::Load(head, *stream).value();
    RetrievalTableOptions options;
    options.storage = storage;
    options.capacity = kItems + 20;
    options.means = true;
    table = RetrievalTable::Build(group, *model, items, options).value();
  }
  std::vector<RetrievalAnswer> Search(const std::vector<RetrievalQuery>& queries,
                                      const RetrievalOptions& options) const {
    return SearchTable(*table, queries, options).value();
  }

  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> communicator = NewSelfCommunicator();
  RetrievalGroup group;
  std::unique_ptr<MolModel> model;
  std::unique_ptr<RetrievalTable> table;
};

RetrievalOptions Options(RetrievalMode mode, int64_t k = 30) {
  RetrievalOptions options;
  options.k = k;
  options.mode = mode;
  return options;
}

void ExpectSame(const std::vector<RetrievalAnswer>& a, const std::vector<RetrievalAnswer>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].ids, b[i].ids) << "query " << i;
    ASSERT_EQ(a[i].scores, b[i].scores) << "query " << i;
  }
}

class RetrievalDeviceTest : public ::testing::TestWithParam<MolStorage> {
 protected:
  void SetUp() override {
#if defined(TRIREME_HOST_CUDA)
    MolConfig config = SmallHead();
    config.component_dim = 16;  // so that the tensor cores take it
    head_ = scratch_.path() + "/head", items_ = scratch_.path() + "/items.safetensors";
    WriteRandomHead(config, head_, 1);
    WriteItems(RandomItems(kItems, config.item_dim, 2, /*attributes=*/true), items_);
    place_ = std::make_unique<Place>(NewHostCudaDevice(/*hidden=*/true));
    place_->Build(head_, items_, GetParam());
    for (int64_t b = 0; b < kQueries; ++b) {
      RetrievalQuery& query = queries_.emplace_back();
      query.user_id = b;
      for (int64_t k = 0; k < config.query_dim; ++k) {
        query.embedding.push_back(static_cast<float>(RandomValue(3, b * config.query_dim + k)));
      }
    }
#else
    GTEST_SKIP() << "CUDA kernels in the emulator: no cuda_bf16.h";
#endif
  }
  ScratchDir scratch_;
  std::string head_, items_;
  std::unique_ptr<Place> place_;
  std::vector<RetrievalQuery> queries_;
};

TEST_P(RetrievalDeviceTest, AnswersAreTheCpusWithinRounding) {
  Place cpu(OpenDevice({.name = "cpu", .threads = 2}).value());
  cpu.Build(head_, items_, GetParam());
  // bf16 queries and gate: the logits of +-20 move by 2^-9 of that, averaged over 16 elements.
  const double tolerance = GetParam() == MolStorage::kF32 ? 5e-5 * 20 : 0.15;
  const auto expected = cpu.Search(queries_, Options(RetrievalMode::kExact));
  const auto found = place_->Search(queries_, Options(RetrievalMode::kExact));
  for (int64_t b = 0; b < kQueries; ++b) {
    for (size_t j = 0; j < expected[b].scores.size(); ++j) {
      EXPECT_NEAR(found[b].scores[j], expected[b].scores[j], tolerance);
    }
  }
}

TEST_P(RetrievalDeviceTest, ModesAgreeBitForBit) {
  queries_[1].filter = place_->table->shard().options().attributes[0];
  const auto all = place_->Search(queries_, Options(RetrievalMode::kExact));
  queries_[2].exclude_ids = {all[2].ids[0], all[2].ids[7]};
  const auto exact = place_->Search(queries_, Options(RetrievalMode::kExact));
  for (const int64_t id : queries_[2].exclude_ids) {
    EXPECT_EQ(std::count(exact[2].ids.begin(), exact[2].ids.end(), id), 0);
  }
  ExpectSame(place_->Search(queries_, Options(RetrievalMode::kPruned)), exact);
  RetrievalOptions two_stage = Options(RetrievalMode::kTwoStage);
  for (const FirstStage stage :
       {FirstStage::kAverage, FirstStage::kPerEmbedding, FirstStage::kCombined}) {
    two_stage.first_stage = stage;
    two_stage.exact_or_certified = true;
    ExpectSame(place_->Search(queries_, two_stage), exact);
    // Whatever is called exact without help is.
    two_stage.exact_or_certified = false;
    two_stage.average_k = two_stage.each_k = 60;
    const auto approximate = place_->Search(queries_, two_stage);
    for (int64_t b = 0; b < kQueries; ++b) {
      if (approximate[b].exact) ExpectSame({approximate[b]}, {exact[b]});
    }
  }
}

TEST_P(RetrievalDeviceTest, UpdatesAndSnapshotsKeepTheBits) {
  RetrievalTable& table = *place_->table;
  const auto before = place_->Search(queries_, Options(RetrievalMode::kPruned, 100));
  // Delete what was answered first, put a new item of NaN and one that is known anew.
  const int64_t first = before[0].ids[0], dim = place_->model->config().item_dim;
  RetrievalItems items;
  items.ids = {1 << 20, before[0].ids[1]};
  for (int64_t k = 0; k < 2 * dim; ++k) {
    items.embeddings.push_back(k == 3 ? NAN : static_cast<float>(RandomValue(5, k)));
  }
  EXPECT_EQ(table.Upsert(items).value(), 1);
  EXPECT_EQ(table.Delete({first}), 1);
  const auto after = place_->Search(queries_, Options(RetrievalMode::kPruned, kItems + 5));
  for (const RetrievalAnswer& answer : after) {
    EXPECT_EQ(std::count(answer.ids.begin(), answer.ids.end(), first), 0);
    EXPECT_EQ(std::count(answer.ids.begin(), answer.ids.end(), 1 << 20), 0);
    EXPECT_EQ(std::count(answer.ids.begin(), answer.ids.end(), -1), 6);
  }
  const std::string dir = scratch_.path() + "/snapshot";
  ASSERT_TRUE(table.SaveSnapshot(dir).ok());
  auto loaded = RetrievalTable::LoadSnapshot(place_->group, *place_->model, dir, {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ExpectSame(SearchTable(**loaded, queries_, Options(RetrievalMode::kPruned, kItems + 5)).value(),
             after);
}

INSTANTIATE_TEST_SUITE_P(Storage, RetrievalDeviceTest,
                         ::testing::Values(MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8));

}  // namespace
}  // namespace trireme
