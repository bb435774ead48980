// Decode steps of a whole decoder, replayed, against the same steps run eagerly and without
// padding: the same logits and the same cache, bit for bit, while sequences come, grow over pages
// and splits, and go. In the emulator, where a graph keeps launches as CUDA's does, and on the GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "models/decoder.h"
#include "parallel/process_groups.h"
#include "runtime/batch_builder.h"
#include "runtime/decode_graphs.h"
#include "runtime/graph_cache.h"
#include "tests/models/temp_dir.h"
#include "tests/random_checkpoint.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr int64_t kSlots = 6, kPageSize = 8, kMaxLength = 640, kPages = 512;

// head_dim 64: the split-KV kernel, and with kMaxLength three splits. Llama without and Qwen3 with
// q/k norms, StarCoder2 with LayerNorm and GELU; one kv head for two query heads.
enum class Family { kLlama, kQwen3, kStarcoder2 };

ModelConfig ConfigOf(DType dtype, Family family) {
  ModelConfig config;
  const bool qwen3 = family == Family::kQwen3, starcoder2 = family == Family::kStarcoder2;
  config.architecture = qwen3        ? "Qwen3ForCausalLM"
                        : starcoder2 ? "Starcoder2ForCausalLM"
                                     : "LlamaForCausalLM";
  if (starcoder2) {
    config.norm = NormKind::kLayer;
    config.mlp = MlpKind::kGelu;
    config.qkv_bias = config.output_bias = config.mlp_bias = true;
  }
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_layers = 2;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 64;
  config.vocab_size = 80;
  config.max_positions = kMaxLength;
  config.qk_norm = qwen3;
  config.tied_head = true;
  config.dtype = dtype;
  return config;
}

// What one way of running steps has to itself.
struct Side {
  KvCache kv;
  BatchBuilder batches;
  Tensor hidden, logits;
};

struct Running {
  int32_t slot = 0, length = 0;  // positions in the cache
  std::vector<int32_t> pages;
};

class GraphReplayTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  DType dtype() const { return GetParam().dtype; }

  void Load(Family family) {
    config_ = ConfigOf(dtype(), family);
    WriteRandomCheckpoint(dir_.path(), config_);
    auto loader = WeightLoader::Open(dir_.path());
    ASSERT_TRUE(loader.ok()) << loader.status();
    DecoderOptions options;
    options.dtype = dtype();
    options.max_batch_tokens = options.max_logit_rows = options.max_sequences = kSlots;
    options.max_positions = options.max_kv_len = kMaxLength;
    auto decoder = Decoder::Load(config_, groups_, **loader, *stream_, options);
    ASSERT_TRUE(decoder.ok()) << decoder.status();
    decoder_ = std::move(decoder).value();
    Make(&eager_);
    Make(&replayed_);
    for (int32_t page = kPages - 1; page >= 0; --page) free_pages_.push_back(page);
  }

  void Make(Side* side) {
    side->kv = KvCache::Create(device_.device(), {.layers = config_.num_layers,
                                                  .pages = kPages,
                                                  .page_size = kPageSize,
                                                  .kv_heads = 1,
                                                  .head_dim = config_.head_dim,
                                                  .dtype = dtype()})
                   .value();
    side->batches =
        BatchBuilder::Create(device_.device(), {.max_num_seqs = kSlots,
                                                .max_batch_tokens = kSlots,
                                                .max_pages_per_sequence = kMaxLength / kPageSize,
                                                .page_size = kPageSize})
            .value();
    side->hidden = Tensor::Create(device_.device(), dtype(), {kSlots, config_.hidden_size}).value();
    side->logits =
        Tensor::Create(device_.device(), DType::kF32, {kSlots, config_.vocab_size}).value();
  }

  TensorView Cached(const Side& side) const {
    const TensorView first = side.kv.Layer(0, {}).k;
    return TensorView(first.data, dtype(), {2 * config_.num_layers * first.elements()});
  }
  // The same keys and values on both sides, whatever trials have left there.
  void FillCaches() {
    FillRandom(Cached(eager_), 7);
    std::memcpy(Cached(replayed_).data, Cached(eager_).data, Cached(eager_).bytes());
  }

  void Compute(Side& side, const Batch& batch) {
    const TensorView hidden = side.hidden.view().Rows(0, batch.tokens());
    decoder_->Embed(*stream_, batch, hidden);
    decoder_->Forward(*stream_, batch, side.kv, hidden);
    decoder_->Logits(*stream_, batch, hidden, side.logits.view().Rows(0, batch.logit_count()));
  }

  void Capture() {
    buckets_ = DecodeBuckets(kSlots);
    for (const int64_t size : buckets_) {
      Batch batch;
      const GraphTrial trial{.fill =
                                 [&](int round) {
                                   batch = replayed_.batches.BuildTrial(
                                       *stream_,
                                       {.sequences = size,
                                        .vocab_size = config_.vocab_size,
                                        .num_pages = kPages,
                                        .max_positions = kMaxLength},
                                       round);
                                 },
                             .work = [&] { Compute(replayed_, batch); },
                             .outputs = {replayed_.hidden.view().Rows(0, size),
                                         replayed_.logits.view().Rows(0, size)}};
      EXPECT_TRUE(graphs_.Capture(*stream_, {.work = "decode", .size = size}, trial)) << size;
    }
  }

  int32_t TakePage() {
    const int32_t page = free_pages_.front();
    free_pages_.pop_front();
    return page;
  }
  uint64_t Draw(uint64_t below) {
    return static_cast<uint64_t>((RandomValue(99, draws_++) + 1.0) / 2.0 *
                                 static_cast<double>(below));
  }

  // Sequences come with something in the cache already, and go, their pages to others.
  void ComeAndGo(StepPlan* plan) {
    while (!running_.empty() && (running_.size() == kSlots || Draw(4) == 0)) {
      const auto at = running_.begin() + static_cast<int64_t>(Draw(running_.size()));
      free_pages_.insert(free_pages_.end(), at->pages.begin(), at->pages.end());
      running_.erase(at);
    }
    while (running_.empty() || (running_.size() < kSlots && Draw(2) == 0)) {
      Running sequence;
      while (std::any_of(running_.begin(), running_.end(),
                         [&](const Running& other) { return other.slot == sequence.slot; })) {
        ++sequence.slot;
      }
      // Short ones, and some around the ends of splits.
      sequence.length = static_cast<int32_t>(Draw(3) > 0 ? 1 + Draw(40) : 254 + Draw(340));
      const int32_t pages = (sequence.length + kPageSize - 1) / kPageSize;
      for (int32_t i = 0; i < pages; ++i) sequence.pages.push_back(TakePage());
      plan->new_sequences.push_back({.slot = sequence.slot,
                                     .prompt_tokens = sequence.length,
                                     .computed_tokens = sequence.length,
                                     .num_pages = pages,
                                     .sampling = {}});
      plan->tokens.insert(plan->tokens.end(), sequence.length, 5);
      plan->pages.insert(plan->pages.end(), sequence.pages.begin(), sequence.pages.end());
      running_.push_back(sequence);
    }
  }
  StepPlan NextPlan() {
    StepPlan plan;
    ComeAndGo(&plan);
    for (Running& sequence : running_) {
      const auto held = static_cast<int32_t>(sequence.pages.size());
      const bool needs_page = sequence.length % kPageSize == 0;
      plan.chunks.push_back({.slot = sequence.slot,
                             .position = sequence.length,
                             .num_tokens = 1,
                             .page_index = held,
                             .num_pages = needs_page ? 1 : 0,
                             .logit_rows = LogitRows::kLast,
                             .decode = true});
      plan.tokens.push_back(static_cast<TokenId>(Draw(config_.vocab_size)));
      if (needs_page) {
        sequence.pages.push_back(TakePage());
        plan.pages.push_back(sequence.pages.back());
      }
      ++sequence.length;
    }
    return plan;
  }

  void Step() {
    const StepPlan plan = NextPlan();
    ASSERT_TRUE(IsDecodeStep(plan));
    const auto count = static_cast<int64_t>(plan.chunks.size());
    Compute(eager_, eager_.batches.Build(*stream_, plan));
    const GraphKey key{.work = "decode", .size = BucketOf(buckets_, count)};
    const Batch batch = replayed_.batches.Build(*stream_, plan, key.size);
    ASSERT_EQ(batch.tokens(), key.size);
    graphs_.Run(*stream_, key, [&] { FAIL() << "not replayed: " << Describe(key); });
    ASSERT_TRUE(stream_->Synchronize().ok());
    ExpectSameBits(replayed_.hidden.view().Rows(0, count), eager_.hidden.view().Rows(0, count));
    ExpectSameBits(replayed_.logits.view().Rows(0, count), eager_.logits.view().Rows(0, count));
    padded_ += key.size - count;
  }

  TempDir dir_;
  ModelConfig config_;
  const ProcessGroups groups_ = SingleRank();
  TestDevice device_{GetParam().device};
  Stream* stream_ = &device_.stream();
  std::unique_ptr<Decoder> decoder_;
  Side eager_, replayed_;
  std::vector<int64_t> buckets_;
  GraphCache graphs_{GraphCache::Options{}};
  std::vector<Running> running_;
  std::deque<int32_t> free_pages_;
  uint64_t draws_ = 0;
  int64_t padded_ = 0;
};

TEST_P(GraphReplayTest, ReplayedStepsAreTheEagerOnesBitForBit) {
  for (const Family family : {Family::kLlama, Family::kQwen3, Family::kStarcoder2}) {
    if (family != Family::kLlama && dtype() != DType::kBF16) continue;
    SCOPED_TRACE(static_cast<int>(family));
    graphs_ = GraphCache(GraphCache::Options{});
    running_.clear();
    free_pages_.clear();
    Load(family);
    Capture();
    FillCaches();
    constexpr int kSteps = 24;
    for (int step = 0; step < kSteps && !HasFailure(); ++step) Step();
    // What padding stores goes nowhere, and all else to the same places.
    ExpectSameBits(Cached(replayed_), Cached(eager_));
    EXPECT_EQ(graphs_.stats().replays, kSteps);
    EXPECT_GT(padded_, 0);
  }
}

// A page table's address, a length or a split that the host had in hand: the trial's second round
// has others.
TEST_P(GraphReplayTest, ALengthOfTheHostIsFoundOut) {
  Load(Family::kLlama);
  Batch batch;
  Tensor positions = Tensor::Create(device_.device(), DType::kI32, {2}).value();
  const GraphTrial trial{
      .fill =
          [&](int round) {
            batch = replayed_.batches.BuildTrial(*stream_,
                                                 {.sequences = 2,
                                                  .vocab_size = config_.vocab_size,
                                                  .num_pages = kPages,
                                                  .max_positions = kMaxLength},
                                                 round);
            if (round == 0) return;
            // As if round 1 had been built elsewhere: the graph looks at the old place.
            stream_->Copy(positions.view().data, batch.positions.data, 2 * sizeof(int32_t));
            const std::vector<int32_t> stale = {0, 0};
            stream_->Copy(const_cast<void*>(batch.positions.data), stale.data(),
                          2 * sizeof(int32_t));
            batch.positions = positions.view();
          },
      .work = [&] { Compute(replayed_, batch); },
      .outputs = {replayed_.logits.view().Rows(0, 2)}};
  EXPECT_FALSE(graphs_.Capture(*stream_, {.work = "decode", .size = 2}, trial));
  EXPECT_EQ(graphs_.stats().refusals(EagerReason::kNotEqual), 1);
}

// The CPU's streams capture nothing.
std::vector<KernelCase> Cases() {
  std::vector<KernelCase> cases = KernelCases();
  std::erase_if(cases, [](const KernelCase& one) { return !one.device.gpu(); });
  if (cases.empty())
    std::printf("SKIPPED: replays: neither the emulator (cuda_bf16.h) nor a GPU\n");
  return cases;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GraphReplayTest);
INSTANTIATE_TEST_SUITE_P(Devices, GraphReplayTest, ::testing::ValuesIn(Cases()), CaseName);

}  // namespace
}  // namespace trireme
