// A request whose logits are no finite numbers ends with a status of its own, in every layout, and
// the others have the tokens they have alone: in the same steps, and in the pages it leaves behind.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "models/safetensors.h"
#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr char kModel[] = "tiny-mistral-swa";  // its head is not its embedding

// A token that no request of the workload has, nor gets; rank 0's word counts.
TokenId UnusedToken(const Transcript& alone) {
  std::set<TokenId> used;
  for (const Request& request : Workload())
    used.insert(request.prompt.begin(), request.prompt.end());
  for (const auto& [key, tokens] : alone) used.insert(tokens.begin(), tokens.end());
  TokenId unused = 3;
  while (used.count(unused) > 0) ++unused;
  std::string bytes = std::to_string(unused);
  World().Broadcast(&bytes);
  return std::stoi(bytes);
}

// The golden model, but the embedding of `token` is NaN. Its folder is rank 0's.
void WritePoisoned(const std::string& dir, TokenId token) {
  namespace fs = std::filesystem;
  for (const auto& file : fs::directory_iterator(GoldenModel(kModel))) {
    if (file.is_regular_file()) fs::copy(file, dir);
  }
  const std::string path = dir + "/model.safetensors";
  fs::permissions(path, fs::perms::owner_write, fs::perm_options::add);
  const auto weights = SafetensorsFile::Open(path);
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const TensorEntry& table = (*weights)->header().tensors.at("model.embed_tokens.weight");
  const int64_t row = (table.end - table.begin) / table.dims[0];
  std::fstream out(path, std::ios::in | std::ios::out | std::ios::binary);
  out.seekp(table.begin + token * row);
  out << std::string(static_cast<size_t>(row), '\xff');  // NaN in f32, bf16 and f16
  ASSERT_TRUE(out.good());
}

class EngineNotFiniteTest : public ::testing::Test {
 protected:
  void SetUp() override {
    alone_ = Alone(kModel, 1);
    poison_ = UnusedToken(alone_);
    dir_ = scratch_.path();
    World().Broadcast(&dir_);
    if (World().rank() == 0) WritePoisoned(dir_, poison_);
    World().Barrier();
  }
  void TearDown() override { World().Barrier(); }  // before rank 0's folder goes

  // Three bad ones among the six of the workload: one prompt, one of two samples, and one that
  // begins like the good ones.
  std::vector<Request> Requests() const {
    std::vector<Request> requests = Workload();
    for (Request& good : requests) good.max_tokens = 24;
    Request bad;
    bad.id = 100;
    bad.prompt = {5, poison_, 7};
    bad.max_tokens = 20;
    requests.insert(requests.begin() + 1, bad);
    bad.id = 101;
    bad.n = 2;
    requests.insert(requests.begin() + 3, bad);
    bad = requests.back();
    bad.id = 102;
    bad.prompt.push_back(poison_);
    requests.push_back(bad);
    return requests;
  }

  void Serve(Engine& engine) {
    std::map<uint64_t, std::vector<TokenOutput>> got;
    for (const Request& request : Requests()) {
      ASSERT_TRUE(
          engine
              .Submit(request,
                      [&got](const TokenOutput& out) { got[out.request_id].push_back(out); })
              .ok());
    }
    EXPECT_TRUE(engine.WaitIdle().ok());
    for (const Request& request : Requests()) {
      const std::vector<TokenOutput>& outputs = got[request.id];
      if (request.id >= 100) {
        ASSERT_EQ(outputs.size(), static_cast<size_t>(request.n)) << "request " << request.id;
        for (const TokenOutput& output : outputs) ExpectFailed(output);
        const auto timeline = engine.Timeline(request.id);
        EXPECT_EQ(timeline->finish, FinishReason::kError);
        EXPECT_EQ(timeline->status.code(), absl::StatusCode::kDataLoss);
        continue;
      }
      Tokens tokens;
      for (const TokenOutput& output : outputs) tokens.push_back(output.sampled.token);
      Tokens expected = alone_.at({request.id, 0});
      tokens.resize(std::min(tokens.size(), expected.size()));
      EXPECT_EQ(tokens, expected) << "request " << request.id;
    }
  }
  static void ExpectFailed(const TokenOutput& output) {
    EXPECT_EQ(output.sampled.token, -1);
    EXPECT_EQ(output.finish, FinishReason::kError);
    EXPECT_EQ(output.status.code(), absl::StatusCode::kDataLoss);
    const std::string line(output.status.message());
    EXPECT_EQ(line.find("request id " + std::to_string(output.request_id) +
                        ": the model gave no finite logit"),
              0u)
        << line;
  }

  ScratchDir scratch_;
  std::string dir_;
  Transcript alone_;  // on rank 0
  TokenId poison_ = 0;
};

TEST_F(EngineNotFiniteTest, EndsTheRequestAndNothingElse) {
  WorkerOptions options;
  options.max_model_len = 128;
  options.page_size = 4;
  options.num_pages = 60;  // what one request leaves another one takes
  options.max_num_seqs = 8;
  for (const Topology& topology : LayoutsOf(World().size())) {
    for (const int64_t budget : {9, 512}) {
      SCOPED_TRACE(NameOf(topology) + " budget " + std::to_string(budget));
      options.max_num_batched_tokens = budget;
      WithWorkerOf(dir_, topology, options, [&](Worker& worker) {
        const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr).value();
        for (int round = 0; round < 2; ++round) Serve(*engine);
        EXPECT_TRUE(engine->Drain().ok());
        const EngineStats stats = engine->Stats();
        EXPECT_EQ(stats.finished[static_cast<size_t>(FinishReason::kError)], 2 * 4);
        EXPECT_EQ(stats.pages_free, stats.pages);
      });
    }
  }
}

}  // namespace
}  // namespace trireme
