// --quantization fp8 through the whole engine, in every layout of the world's size: the logits are
// those of a checkpoint that holds the rounded weights, whatever the layout; and what is refused.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "models/memory_plan.h"
#include "runtime/evaluation.h"
#include "tests/golden_logits.h"
#include "tests/parallel/world.h"
#include "tests/rewritten_checkpoint.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

// Both runs are within 1e-3 of what float64 has for the same weights (tests/golden/README.md).
constexpr double kTolerance = 2e-3;

WorkerOptions OptionsOf(Quantization quantization) {
  WorkerOptions options;
  options.quantization = quantization;
  options.max_num_seqs = 1;
  options.max_logit_rows = 512;
  return options;
}

// Of all positions of the model's golden prompts; empty but on the leader. Collective.
std::vector<float> Logits(const std::string& model, const std::string& dir,
                          const Topology& topology, Quantization quantization) {
  std::vector<float> out;
  WithWorkerOf(dir, topology, OptionsOf(quantization), [&](Worker& worker) {
    StepPipeline pipeline(worker);
    for (const GoldenLogits& golden : ReadGoldenLogits(GoldenModel(model))) {
      const auto status =
          Evaluate(worker, pipeline, golden.ids, [&](int64_t, std::span<const float> row) {
            out.insert(out.end(), row.begin(), row.end());
          });
      EXPECT_TRUE(status.ok()) << status.message();
    }
  });
  return out;
}

double LargestDifference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max<double>(worst, std::abs(a[i] - b[i]));
  return worst;
}

class QuantizationTest : public ::testing::TestWithParam<const char*> {};

TEST_P(QuantizationTest, LogitsAreThoseOfTheRoundedWeightsInEveryLayout) {
  const std::string model = GetParam();
  const ModelConfig config = LoadModelConfig(GoldenModel(model)).value();
  const ScratchDir scratch;  // each rank has a copy of its own
  WriteDequantizedCheckpoint(GoldenModel(model), scratch.path());
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (topology.pp_size > config.num_layers) continue;
    SCOPED_TRACE(NameOf(topology));
    const std::vector<float> quantized =
        Logits(model, GoldenModel(model), topology, Quantization::kFp8);
    const std::vector<float> rounded = Logits(model, scratch.path(), topology, Quantization::kNone);
    const std::vector<float> original =
        Logits(model, GoldenModel(model), topology, Quantization::kNone);
    if (World().rank() != 0) continue;
    EXPECT_LE(LargestDifference(quantized, rounded), kTolerance);
    // It is not the original that was computed.
    EXPECT_GT(LargestDifference(quantized, original), 10 * kTolerance);
  }
}

// Layouts differ by the order of sums over ranks, which may round an activation to the next code,
// and by the scales of the pieces of a row. That is little beside what quantising itself changes.
TEST_P(QuantizationTest, DynamicActivationsAreNearTheWeightsAloneInEveryLayout) {
  const std::string model = GetParam();
  const ModelConfig config = LoadModelConfig(GoldenModel(model)).value();
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (topology.pp_size > config.num_layers) continue;
    SCOPED_TRACE(NameOf(topology));
    const std::vector<float> dynamic =
        Logits(model, GoldenModel(model), topology, Quantization::kFp8Dynamic);
    const std::vector<float> weights =
        Logits(model, GoldenModel(model), topology, Quantization::kFp8);
    if (World().rank() != 0) continue;
    ASSERT_EQ(dynamic.size(), weights.size());
    double squares = 0.0, differences = 0.0;
    for (size_t i = 0; i < weights.size(); ++i) {
      squares += double{weights[i]} * weights[i];
      differences += std::pow(double{dynamic[i]} - weights[i], 2);
    }
    EXPECT_GT(differences, 0.0);
    EXPECT_LT(std::sqrt(differences / squares), 0.25);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, QuantizationTest,
                         ::testing::Values("stories260K", "tiny-llama3", "tiny-qwen2", "tiny-qwen3",
                                           "tiny-mistral-swa", "tiny-starcoder2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(QuantizationMemoryTest, AWorkerHoldsWhatWasPlanned) {
  const std::string model = "tiny-llama3";
  const ModelConfig config = LoadModelConfig(GoldenModel(model)).value();
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (topology.pp_size > config.num_layers) continue;
    SCOPED_TRACE(NameOf(topology));
    int64_t held[3];
    for (const Quantization quantization :
         {Quantization::kNone, Quantization::kFp8, Quantization::kFp8Dynamic}) {
      WorkerOptions options = OptionsOf(quantization);
      options.device.threads = 1;
      options.dtype = DType::kF32;
      auto worker = Worker::Load(World(), topology, GoldenModel(model), options);
      ASSERT_TRUE(worker.ok()) << worker.status().message();
      const int64_t planned =
          PlanRankBytes(config, topology, DType::kF32, {}, quantization)[World().rank()]
              .weight_bytes;
      held[static_cast<int>(quantization)] = (*worker)->weight_bytes();
      // Panels are padded.
      EXPECT_GE((*worker)->weight_bytes(), planned);
      EXPECT_LE((*worker)->weight_bytes(), planned * 5 / 4);
      World().Barrier();
    }
    EXPECT_LT(held[1], held[0] * 2 / 3);
    EXPECT_EQ(held[2], held[1]);
  }
}

TEST(QuantizationErrorTest, AWeightThatIsNotFiniteIsNamed) {
  for (const char* name :
       {"model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"}) {
    const ScratchDir scratch;
    RewriteCheckpoint(GoldenModel("tiny-llama3"), scratch.path(),
                      [&](const WeightSpec& spec, std::vector<float>* values) {
                        if (spec.name == name)
                          values->back() = std::numeric_limits<float>::infinity();
                      });
    WorkerOptions options = OptionsOf(Quantization::kFp8);
    options.device.threads = 1;
    const absl::Status status =
        Worker::Load(World(), {World().size(), 1, 1}, scratch.path(), options).status();
    EXPECT_NE(status.message().find(std::string("tensor \"") + name + "\" holds NaN or infinity"),
              std::string::npos)
        << status;
    World().Barrier();
  }
}

}  // namespace
}  // namespace trireme
