// A whole decoder on every kind of device, the CUDA backend's kernels in the emulator among them:
// golden logits, a prompt in two chunks. tests/runtime/golden_test.cc does the same through the
// engine, in all layouts.
#include "models/decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cpu/isa.h"
#include "models/kv_cache.h"
#include "models/weights.h"
#include "parallel/process_groups.h"
#include "tests/golden_logits.h"
#include "tests/random_checkpoint.h"
#include "tests/rewritten_checkpoint.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr double kF32Tolerance = 1e-3;  // tests/golden/README.md

// One sequence alone in a cache of one page after the other.
class OneSequence {
 public:
  OneSequence(const TestDevice& device, const Decoder& decoder, int64_t positions,
              DType dtype = DType::kF32)
      : device_(device), dtype_(dtype), pages_((positions + kPageSize - 1) / kPageSize) {
    auto cache = KvCache::Create(device.device(), {.layers = decoder.layers().size(),
                                                   .pages = pages_,
                                                   .page_size = kPageSize,
                                                   .kv_heads = decoder.kv_heads(),
                                                   .head_dim = decoder.config().head_dim,
                                                   .dtype = dtype});
    EXPECT_TRUE(cache.ok()) << cache.status();
    cache_ = std::move(cache).value();
  }

  // Logits [tokens, V] of the sequence's next tokens.
  std::vector<double> Feed(Decoder& decoder, const std::vector<int32_t>& tokens) {
    const auto count = static_cast<int32_t>(tokens.size());
    std::vector<int32_t> positions(tokens.size()), pages(pages_), rows(tokens.size());
    std::iota(positions.begin(), positions.end(), fed_);
    std::iota(pages.begin(), pages.end(), 0);
    std::iota(rows.begin(), rows.end(), 0);
    const std::vector<int64_t> slots(positions.begin(), positions.end());
    fed_ += count;
    const Tensor ids = device_.From(tokens), at = device_.From(positions),
                 slot_mapping = device_.From(slots), table = device_.From(pages),
                 cu_q_lens = device_.From(std::vector<int32_t>{0, count}),
                 kv_lens = device_.From(std::vector<int32_t>{fed_}),
                 logit_rows = device_.From(rows);
    Batch batch;
    batch.token_ids = ids.view();
    batch.positions = at.view();
    batch.slot_mapping = slot_mapping.view();
    batch.cu_q_lens = cu_q_lens.view();
    batch.kv_lens = kv_lens.view();
    batch.page_tables = ConstTensorView(table.view().data, DType::kI32, {1, pages_});
    batch.logit_rows = logit_rows.view();
    const Tensor hidden = device_.Zeros(dtype_, {count, decoder.config().hidden_size});
    const Tensor logits = device_.Zeros(DType::kF32, {count, decoder.config().vocab_size});
    Stream& stream = device_.stream();
    decoder.Embed(stream, batch, hidden.view());
    decoder.Forward(stream, batch, cache_, hidden.view());
    decoder.Logits(stream, batch, hidden.view(), logits.view());
    EXPECT_TRUE(stream.Synchronize().ok());
    return ToDoubles(logits.view());
  }

 private:
  static constexpr int64_t kPageSize = 5;
  const TestDevice& device_;
  const DType dtype_;
  int64_t pages_;
  int32_t fed_ = 0;
  KvCache cache_;
};

struct DecoderCase {
  DeviceCase device;
  std::string model;
};
std::vector<DecoderCase> DecoderCases() {
  std::vector<DecoderCase> cases;
  for (const DeviceCase& device : DeviceCases()) {
    for (const char* model : {"stories260K", "tiny-llama3", "tiny-qwen2", "tiny-qwen3",
                              "tiny-mistral-swa", "tiny-starcoder2"}) {
      // The emulator takes 15 s for its 1,000 tokens, and the others do not leave anything out.
      if (device.host_cuda && std::string(model) == "stories260K") continue;
      cases.push_back({device, model});
    }
  }
  return cases;
}

class DecoderTest : public ::testing::TestWithParam<DecoderCase> {
 protected:
  DecoderTest() { cpu::UseIsa(GetParam().device.isa); }
  ~DecoderTest() override { cpu::UseIsa(0); }
};

TEST_P(DecoderTest, GoldenLogitsInTwoChunks) {
  const TestDevice device(GetParam().device);
  const std::string dir = GoldenModel(GetParam().model);
  const auto config = LoadModelConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  auto loader = WeightLoader::Open(dir);
  ASSERT_TRUE(loader.ok()) << loader.status();
  const ProcessGroups groups = SingleRank();
  DecoderOptions options;
  options.max_batch_tokens = options.max_logit_rows = options.max_positions = 512;
  auto decoder = Decoder::Load(*config, groups, **loader, device.stream(), options);
  ASSERT_TRUE(decoder.ok()) << decoder.status();
  for (const GoldenLogits& golden : ReadGoldenLogits(dir)) {
    SCOPED_TRACE(golden.name);
    const auto cut = golden.ids.begin() + static_cast<int64_t>(golden.ids.size()) / 3;
    OneSequence sequence(device, **decoder, static_cast<int64_t>(golden.ids.size()));
    std::vector<double> logits;
    for (const std::vector<int32_t>& part : {std::vector<int32_t>(golden.ids.begin(), cut),
                                             std::vector<int32_t>(cut, golden.ids.end())}) {
      if (part.empty()) continue;
      const std::vector<double> rows = sequence.Feed(**decoder, part);
      logits.insert(logits.end(), rows.begin(), rows.end());
    }
    ASSERT_EQ(logits.size(), golden.logits.size());
    double worst = 0.0;
    for (size_t i = 0; i < logits.size(); ++i)
      worst = std::max(worst, std::abs(logits[i] - golden.logits[i]));
    EXPECT_LE(worst, kF32Tolerance);
  }
}

// In fp8, as a checkpoint of the rounded weights has them: each within the tolerance of what
// float64 has for those weights.
TEST_P(DecoderTest, QuantizedLogitsAreThoseOfTheRoundedWeights) {
  const TestDevice device(GetParam().device);
  const std::string dir = GoldenModel(GetParam().model);
  const ScratchDir rounded;
  WriteDequantizedCheckpoint(dir, rounded.path());
  std::vector<int32_t> tokens = ReadGoldenLogits(dir)[0].ids;
  constexpr size_t kTokens = 40;
  tokens.resize(std::min(tokens.size(), kTokens));
  const auto logits = [&](const std::string& from, Quantization quantization) {
    const ModelConfig config = LoadModelConfig(from).value();
    const auto loader = WeightLoader::Open(from).value();
    const ProcessGroups groups = SingleRank();
    DecoderOptions options;
    options.quantization = quantization;
    options.max_batch_tokens = options.max_logit_rows = options.max_positions = 512;
    const auto decoder = Decoder::Load(config, groups, *loader, device.stream(), options).value();
    return OneSequence(device, *decoder, kTokens).Feed(*decoder, tokens);
  };
  const std::vector<double> quantized = logits(dir, Quantization::kFp8),
                            expected = logits(rounded.path(), Quantization::kNone);
  ASSERT_EQ(quantized.size(), expected.size());
  for (size_t i = 0; i < quantized.size(); ++i)
    ASSERT_NEAR(quantized[i], expected[i], 2 * kF32Tolerance) << i;
}

// Heads as wide as real models': prompts and single tokens by the attention kernels of tensor
// cores, which golden models' heads are too narrow for. In 16 bits a device is as far from f32 as
// the CPU.
TEST(DecoderWideHeadsTest, SixteenBitsAreAsCloseOnEveryDevice) {
  const ScratchDir dir;
  ModelConfig config;
  config.architecture = "LlamaForCausalLM";
  config.hidden_size = 96;
  config.intermediate_size = 160;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 1;
  config.head_dim = 128;
  config.vocab_size = 80;
  config.max_positions = 128;
  config.tied_head = true;
  config.dtype = DType::kBF16;
  WriteRandomCheckpoint(dir.path(), config);
  constexpr int64_t kTokens = 90, kPrompt = 75;
  const auto logits = [&](const TestDevice& device, DType dtype) {
    const auto loader = WeightLoader::Open(dir.path()).value();
    const ProcessGroups groups = SingleRank();
    DecoderOptions options;
    options.dtype = dtype;
    options.max_batch_tokens = options.max_logit_rows = options.max_positions = 128;
    const auto decoder = Decoder::Load(config, groups, *loader, device.stream(), options).value();
    OneSequence sequence(device, *decoder, kTokens, dtype);
    std::vector<int32_t> prompt(kPrompt);
    for (int32_t i = 0; i < kPrompt; ++i) prompt[i] = i * 7 % 80;
    std::vector<double> all = sequence.Feed(*decoder, prompt);
    for (int32_t i = kPrompt; i < kTokens; ++i) {
      const std::vector<double> next = sequence.Feed(*decoder, {i * 7 % 80});
      all.insert(all.end(), next.begin(), next.end());
    }
    return all;
  };
  const TestDevice cpu;
  const std::vector<double> exact = logits(cpu, DType::kF32);
  const auto distance = [&](const std::vector<double>& got) {
    double sum = 0.0;
    for (size_t i = 0; i < exact.size(); ++i) sum += std::abs(got[i] - exact[i]);
    return sum / static_cast<double>(exact.size());
  };
  const double of_cpu = distance(logits(cpu, DType::kBF16));
  EXPECT_GT(of_cpu, 0.0);
  for (const DeviceCase& device : DeviceCases()) {
    if (!device.gpu()) continue;
    EXPECT_LT(distance(logits(TestDevice(device), DType::kBF16)), 1.5 * of_cpu) << device.name;
  }
}

// With activations of e4m3 each token has a scale of its own: how a prompt is cut into chunks, few
// rows or many, changes no bit. They are other logits than those of the weights alone, by little.
TEST_P(DecoderTest, QuantizedActivationsInChunksHaveTheBitsOfTheWhole) {
  const TestDevice device(GetParam().device);
  const std::string dir = GoldenModel(GetParam().model);
  std::vector<int32_t> tokens = ReadGoldenLogits(dir)[0].ids;
  constexpr size_t kTokens = 40;
  tokens.resize(std::min(tokens.size(), kTokens));
  const ModelConfig config = LoadModelConfig(dir).value();
  const ProcessGroups groups = SingleRank();
  const auto loader = WeightLoader::Open(dir).value();
  const auto logits = [&](Quantization quantization, DType dtype, size_t chunk) {
    DecoderOptions options;
    options.dtype = dtype;
    options.quantization = quantization;
    options.max_batch_tokens = options.max_logit_rows = options.max_positions = 512;
    const auto decoder = Decoder::Load(config, groups, *loader, device.stream(), options).value();
    OneSequence sequence(device, *decoder, kTokens, dtype);
    std::vector<double> all;
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const size_t end = std::min(begin + chunk, tokens.size());
      const std::vector<double> rows =
          sequence.Feed(*decoder, {tokens.begin() + begin, tokens.begin() + end});
      all.insert(all.end(), rows.begin(), rows.end());
    }
    return all;
  };
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const std::vector<double> whole = logits(Quantization::kFp8Dynamic, dtype, kTokens);
    EXPECT_EQ(whole, logits(Quantization::kFp8Dynamic, dtype, 1));
    EXPECT_EQ(whole, logits(Quantization::kFp8Dynamic, dtype, 18));
    const std::vector<double> weights = logits(Quantization::kFp8, dtype, kTokens);
    double squares = 0.0, differences = 0.0;
    for (size_t i = 0; i < whole.size(); ++i) {
      squares += weights[i] * weights[i];
      differences += (whole[i] - weights[i]) * (whole[i] - weights[i]);
    }
    EXPECT_GT(differences, 0.0);
    EXPECT_LT(std::sqrt(differences / squares), 0.25) << Name(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, DecoderTest, ::testing::ValuesIn(DecoderCases()),
                         [](const auto& info) {
                           std::string name = info.param.device.name + "_" + info.param.model;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace trireme
