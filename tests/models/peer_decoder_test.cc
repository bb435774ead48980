// A decoder cut over ranks whose sums go over peer memory, fused with the norms, eager and
// replayed, against the same decoder with plain sums: the same bits. Ranks are threads, the device
// is the emulator.
#include <gtest/gtest.h>

#include <barrier>
#include <cstring>
#include <numeric>

#include "kernels/cuda/cuda_ops.h"
#include "models/decoder.h"
#include "models/kv_cache.h"
#include "parallel/rank_sum.h"
#include "tests/host_cuda/peer_ranks.h"
#include "tests/models/temp_dir.h"
#include "tests/random_checkpoint.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr int64_t kTokens = 5, kPageSize = 8;

// RMSNorm and SwiGLU, or LayerNorm, biases everywhere and GELU.
ModelConfig Config(DType dtype, bool starcoder2) {
  ModelConfig config;
  config.architecture = starcoder2 ? "Starcoder2ForCausalLM" : "LlamaForCausalLM";
  if (starcoder2) {
    config.norm = NormKind::kLayer;
    config.mlp = MlpKind::kGelu;
    config.qkv_bias = config.output_bias = config.mlp_bias = true;
  }
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 4;
  config.head_dim = 64;
  config.vocab_size = 80;
  config.max_positions = 64;
  config.tied_head = true;
  config.dtype = dtype;
  return config;
}

// What ranks that are threads have to sum.
class SumCommunicator : public Communicator {
 protected:
  SumCommunicator(int rank, int size) { rank_ = rank, size_ = size; }
  void DoAllGather(Stream&, ConstTensorView, TensorView) override { NotHere(); }
  int64_t DoSend(Stream&, ConstTensorView, int) override { NotHere(); }
  void DoWaitSend(Stream&, int64_t) override { NotHere(); }
  void DoRecv(Stream&, TensorView, int) override { NotHere(); }
  [[noreturn]] static void NotHere() { Fatal(__FILE__, __LINE__, "only sums"); }
};

struct Meeting {
  explicit Meeting(int size) : parts(size), all(size) {}
  std::vector<const void*> parts;
  std::barrier<> all;
};

class PlainSums final : public SumCommunicator {
 public:
  PlainSums(int rank, Meeting& meeting)
      : SumCommunicator(rank, static_cast<int>(meeting.parts.size())), meeting_(meeting) {}

 private:
  void DoAllReduceSum(Stream&, TensorView data) override {
    meeting_.parts[rank_] = data.data;
    meeting_.all.arrive_and_wait();
    std::vector<char> sum(data.bytes());
    SumInOrder(data.dtype, meeting_.parts, data.elements(), sum.data());
    meeting_.all.arrive_and_wait();
    std::memcpy(data.data, sum.data(), sum.size());
  }
  Meeting& meeting_;
};

class PeerCommunicator final : public SumCommunicator {
 public:
  PeerCommunicator(const cuda::PeerGroup& group, cuda::PeerPath path, bool fuses)
      : SumCommunicator(group.rank, group.size), group_(group), path_(path), fuses_(fuses) {}
  bool FusesNorm(ConstTensorView) const override { return fuses_; }

 private:
  void DoAllReduceSum(Stream& stream, TensorView data) override {
    PeerSum(cuda::NativeHandle(stream), group_, path_, data);
  }
  void DoAllReduceAddNorm(Stream& stream, TensorView data, TensorView residual,
                          const NormParams& norm, TensorView out) override {
    PeerSumAddNorm(cuda::NativeHandle(stream), group_, path_, data, residual, norm, out);
  }
  const cuda::PeerGroup group_;
  const cuda::PeerPath path_;
  const bool fuses_;
};

// One rank: its shard, its cache, and a chunk of one sequence at addresses that do not move.
class Rank {
 public:
  Rank(const std::string& dir, const ModelConfig& config, int rank, int size)
      : dtype_(config.dtype) {
    groups_.topology = {.tp_size = size};
    groups_.rank = rank;
    auto loader = WeightLoader::Open(dir);
    DecoderOptions options;
    options.dtype = dtype_;
    options.max_batch_tokens = options.max_logit_rows = kTokens;
    options.max_positions = config.max_positions;
    decoder_ = Decoder::Load(config, groups_, **loader, device_.stream(), options).value();
    cache_ = KvCache::Create(device_.device(), {.layers = config.num_layers,
                                                .pages = 1,
                                                .page_size = kPageSize,
                                                .kv_heads = decoder_->kv_heads(),
                                                .head_dim = config.head_dim,
                                                .dtype = dtype_})
                 .value();
    std::vector<int32_t> count(kTokens);
    std::iota(count.begin(), count.end(), 0);
    positions_ = device_.From(count);
    slots_ = device_.From(std::vector<int64_t>(count.begin(), count.end()));
    ids_ = device_.Zeros(DType::kI32, {kTokens});
    pages_ = device_.Zeros(DType::kI32, {1});
    cu_q_lens_ = device_.From(std::vector<int32_t>{0, kTokens});
    kv_lens_ = device_.From(std::vector<int32_t>{kTokens});
    hidden_ = device_.Zeros(dtype_, {kTokens, config.hidden_size});
    logits_ = device_.Zeros(DType::kF32, {kTokens, decoder_->vocabulary().size()});
    batch_.token_ids = ids_.view();
    batch_.positions = batch_.logit_rows = positions_.view();
    batch_.slot_mapping = slots_.view();
    batch_.cu_q_lens = cu_q_lens_.view();
    batch_.kv_lens = kv_lens_.view();
    batch_.page_tables = ConstTensorView(pages_.view().data, DType::kI32, {1, 1});
  }

  void UseTokens(int32_t first) {
    for (int64_t t = 0; t < kTokens; ++t)
      ids_.view().as<int32_t>()[t] = static_cast<int32_t>((first + 17 * t) % 80);
  }
  void SumBy(std::unique_ptr<Communicator> tp) { groups_.tp = std::move(tp); }
  void Enqueue() {
    decoder_->Embed(device_.stream(), batch_, hidden_.view());
    decoder_->Forward(device_.stream(), batch_, cache_, hidden_.view());
    decoder_->Logits(device_.stream(), batch_, hidden_.view(), logits_.view());
  }
  Stream& stream() { return device_.stream(); }
  // The hidden states and this rank's logits.
  std::string Result() const {
    std::string bytes;
    for (const TensorView& view : {hidden_.view(), logits_.view()})
      bytes.append(view.as<char>(), static_cast<size_t>(view.bytes()));
    return bytes;
  }

 private:
  const TestDevice device_{DeviceCase{.name = "host_cuda", .host_cuda = true}};
  const DType dtype_;
  ProcessGroups groups_;
  std::unique_ptr<Decoder> decoder_;
  KvCache cache_;
  Tensor ids_, positions_, slots_, pages_, cu_q_lens_, kv_lens_, hidden_, logits_;
  Batch batch_;
};

class PeerDecoderTest : public ::testing::TestWithParam<std::tuple<DType, bool>> {};

TEST_P(PeerDecoderTest, HasTheBitsOfPlainSums) {
  const TempDir dir;
  const auto [dtype, starcoder2] = GetParam();
  const ModelConfig config = Config(dtype, starcoder2);
  WriteRandomCheckpoint(dir.path(), config);
  std::vector<int> sizes = {2, 4};
  if (kThreadSanitizer) sizes = {2};  // it holds a megabyte for each thread of each block
  for (const int size : sizes) {
    PeerRanks peers(size);
    Meeting meeting(size);
    peers.Run([&](int r) {
      Rank rank(dir.path(), config, r, size);
      std::vector<std::string> expected;
      rank.SumBy(std::make_unique<PlainSums>(r, meeting));
      for (const int32_t first : {3, 50, 7}) {
        rank.UseTokens(first);
        rank.Enqueue();
        expected.push_back(rank.Result());
      }
      EXPECT_NE(expected[0], expected[1]);
      for (const cuda::PeerPath path : {cuda::PeerPath::kOneShot, cuda::PeerPath::kTwoShot}) {
        for (const bool fuses : {false, true}) {
          rank.SumBy(std::make_unique<PeerCommunicator>(peers.Of(r), path, fuses));
          rank.UseTokens(3);
          rank.Enqueue();
          EXPECT_EQ(rank.Result(), expected[0]) << size << " ranks, rank " << r;
        }
        // Fused, as it was set last.
        const auto graph = rank.stream().Capture([&] { rank.Enqueue(); });
        ASSERT_TRUE(graph.ok()) << graph.status();
        for (const size_t round : {1, 2}) {
          rank.UseTokens(round == 1 ? 50 : 7);
          (*graph)->Replay(rank.stream());
          EXPECT_EQ(rank.Result(), expected[round]) << size << " ranks, rank " << r;
        }
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Types, PeerDecoderTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kBF16,
                                                              DType::kF16),
                                            ::testing::Bool()),
                         [](const auto& info) {
                           return std::string(Name(std::get<0>(info.param))) +
                                  (std::get<1>(info.param) ? "_starcoder2" : "_llama");
                         });

}  // namespace
}  // namespace trireme
