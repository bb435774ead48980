#include "models/memory_plan.h"

#include <gtest/gtest.h>

#include "models/checkpoint_maker.h"
#include "models/weights.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

ModelConfig Named(const std::string& name) {
  auto config = CheckpointRecipeConfig(name);
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

ModelConfig Golden(const std::string& name) {
  auto config = LoadModelConfig(GoldenDir(name));
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

// Counts that the files of the golden checkpoints hold and that the models' publishers give.
TEST(MemoryPlanTest, TotalParameters) {
  EXPECT_EQ(TotalParameters(Golden("stories260K")), 260032);
  EXPECT_EQ(TotalParameters(Golden("tiny-llama3")), 287360);
  EXPECT_EQ(TotalParameters(Golden("tiny-qwen2")), 218176);
  EXPECT_EQ(TotalParameters(Golden("tiny-qwen3")), 263232);
  EXPECT_EQ(TotalParameters(Golden("tiny-mistral-swa")), 238528);
  EXPECT_EQ(TotalParameters(Golden("tiny-starcoder2")), 216384);
  EXPECT_EQ(TotalParameters(Named("llama-3.2-1b")), 1235814400);
  EXPECT_EQ(TotalParameters(Named("llama-3.2-3b")), 3212749824);
  EXPECT_EQ(TotalParameters(Named("llama-3.1-8b")), 8030261248);
  EXPECT_EQ(TotalParameters(Named("llama-3.1-70b")), 70553706496);
  EXPECT_EQ(TotalParameters(Named("qwen3-0.6b")), 596049920);
  EXPECT_EQ(TotalParameters(Named("qwen3-1.7b")), 1720574976);
  EXPECT_EQ(TotalParameters(Named("qwen3-8b")), 8190735360);
  EXPECT_EQ(TotalParameters(Named("qwen2.5-0.5b")), 494032768);
  EXPECT_EQ(TotalParameters(Named("qwen2.5-7b")), 7615616512);
  EXPECT_EQ(TotalParameters(Named("mistral-7b")), 7248023552);
  EXPECT_EQ(TotalParameters(Named("tinyllama-1.1b")), 1100048384);
  EXPECT_EQ(TotalParameters(Named("starcoder2-3b")), 3030371328);
}

TEST(MemoryPlanTest, OneRankHoldsTheModel) {
  const ModelConfig config = Named("llama-3.1-8b");
  const std::vector<RankBytes> plan = PlanRankBytes(config, {1, 1, 1}, DType::kBF16);
  ASSERT_EQ(plan.size(), 1u);
  EXPECT_EQ(plan[0].parameters, TotalParameters(config));
  EXPECT_EQ(plan[0].weight_bytes, 2 * TotalParameters(config));
  EXPECT_EQ(plan[0].kv_bytes_per_token, 2 * 32 * 8 * 128 * 2);
  EXPECT_EQ(plan[0].layers, (Range{0, 32}));
}

// The published sizes of the blocks' matrices: a byte each and 4 for a row; the rest as it was.
TEST(MemoryPlanTest, QuantizedLinearLayers) {
  const ModelConfig config = Named("llama-3.1-8b");
  const int64_t qkv_rows = 4096 + 2 * 1024, mlp = 14336;
  const int64_t elements = 32 * (qkv_rows * 4096 + 4096 * 4096 + 3 * mlp * 4096);
  const int64_t rows = 32 * (qkv_rows + 4096 + 2 * mlp + 4096);
  const auto plan = [&](const Topology& topology) {
    return PlanRankBytes(config, topology, DType::kBF16, {}, Quantization::kFp8);
  };
  EXPECT_EQ(plan({1, 1, 1})[0].weight_bytes,
            2 * (TotalParameters(config) - elements) + elements + 4 * rows);
  EXPECT_EQ(plan({1, 1, 1})[0].kv_bytes_per_token, 2 * 32 * 8 * 128 * 2);
  // Of o and down each rank has all rows' scales.
  int64_t sum = 0;
  for (const RankBytes& rank : plan({2, 1, 1})) sum += rank.weight_bytes;
  const int64_t norms = 2 * (2 * 32 + 1) * 4096;
  EXPECT_EQ(sum, plan({1, 1, 1})[0].weight_bytes + norms + 4 * 32 * 2 * 4096);
}

// Without a gate there are two matrices in an MLP, and biases stay as they are.
TEST(MemoryPlanTest, QuantizedLayersWithoutAGate) {
  const ModelConfig config = Named("starcoder2-3b");
  const int64_t qkv_rows = 3072 + 2 * 256, mlp = 12288;
  const int64_t elements = 30 * (qkv_rows * 3072 + 3072 * 3072 + 2 * mlp * 3072);
  const int64_t rows = 30 * (qkv_rows + 3072 + mlp + 3072);
  EXPECT_EQ(PlanRankBytes(config, {1, 1, 1}, DType::kBF16, {}, Quantization::kFp8)[0].weight_bytes,
            2 * (TotalParameters(config) - elements) + elements + 4 * rows);
}

// What a loader reads for a rank is what the plan says, tensor by tensor.
TEST(MemoryPlanTest, AgreesWithTheBytesThatARankReads) {
  for (const char* model :
       {"tiny-llama3", "tiny-qwen2", "tiny-qwen3", "tiny-mistral-swa", "tiny-starcoder2"}) {
    const ModelConfig config = Golden(model);
    const DecoderWeightSpecs specs = WeightSpecsOf(config);
    for (const Topology topology :
         {Topology{1, 1, 1}, Topology{4, 1, 1}, Topology{8, 2, 1}, Topology{2, 2, 2}}) {
      for (const RankBytes& rank : PlanRankBytes(config, topology, DType::kF32)) {
        const int tp = topology.TpIndex(rank.rank), stage = topology.PpIndex(rank.rank);
        std::vector<WeightSpec> mine;
        if (stage == 0) mine.push_back(specs.embedding);
        for (int64_t i = rank.layers.begin; i < rank.layers.end; ++i) {
          for (const WeightSpec& spec : SpecsOfLayer(specs.layers[i])) mine.push_back(spec);
        }
        if (stage == topology.pp_size - 1) {
          for (const WeightSpec& spec : SpecsOfFinalNorm(specs)) mine.push_back(spec);
          if (!config.tied_head || topology.pp_size > 1) mine.push_back(specs.head);
        }
        auto loader = WeightLoader::Open(GoldenDir(model));
        ASSERT_TRUE(loader.ok()) << loader.status();
        for (const WeightSpec& spec : mine) {
          Shape shape = spec.shape;
          const Range piece = PieceOfSpec(spec, tp, topology.tp_size);
          if (spec.split != Split::kNone) shape.dims[spec.split == Split::kCols] = piece.size();
          std::vector<float> out(shape.elements());
          ASSERT_TRUE(
              (*loader)
                  ->Load(spec, tp, topology.tp_size, TensorView(out.data(), DType::kF32, shape))
                  .ok());
        }
        EXPECT_EQ((*loader)->bytes_read(), rank.weight_bytes) << model << " rank " << rank.rank;
      }
    }
  }
}

TEST(MemoryPlanTest, KvHeadsStayWholeWhenReplicated) {
  const ModelConfig config = Golden("tiny-qwen3");  // 4 KV heads of 16, 4 layers
  EXPECT_EQ(PlanRankBytes(config, {4, 1, 1}, DType::kBF16)[0].kv_bytes_per_token, 2 * 4 * 16 * 2);
  EXPECT_EQ(PlanRankBytes(config, {8, 1, 1}, DType::kBF16)[7].kv_bytes_per_token, 2 * 4 * 16 * 2);
}

TEST(MemoryPlanTest, StagesCoverTheLayersAndTheHeadWeighsOnTheLast) {
  const ModelConfig config = Named("qwen2.5-7b");
  for (int pp = 1; pp <= config.num_layers; ++pp) {
    const std::vector<Range> stages = StageLayers(config, pp);
    ASSERT_EQ(stages.size(), static_cast<size_t>(pp));
    int64_t at = 0;
    for (const Range& stage : stages) {
      EXPECT_EQ(stage.begin, at);
      EXPECT_GE(stage.size(), 1);
      at = stage.end;
    }
    EXPECT_EQ(at, config.num_layers);
  }
  // The head counts as half a layer of 233 M parameters (2.3 for one token in five): not enough to
  // move a layer of an even number, but an odd one goes to the first stage.
  EXPECT_EQ(StageLayers(config, 2), (std::vector<Range>{{0, 14}, {14, 28}}));
  ModelConfig odd = config;
  odd.num_layers = 27;
  EXPECT_EQ(StageLayers(odd, 2), (std::vector<Range>{{0, 14}, {14, 27}}));
}

TEST(MemoryPlanTest, ASplitByHandLosesNoLayer) {
  ModelConfig config;
  config.num_layers = 16;
  EXPECT_EQ(StageLayers(config, 3, {9, 6, 1}), (std::vector<Range>{{0, 9}, {9, 15}, {15, 16}}));
  EXPECT_TRUE(CheckSplit(config, 4, {}).ok());
  const auto says = [&](int pp, const std::vector<int64_t>& split) {
    return std::string(CheckSplit(config, pp, split).message());
  };
  EXPECT_NE(says(2, {9, 6, 1}).find("3 numbers for 2 stages"), std::string::npos);
  EXPECT_NE(says(2, {9, 6}).find("adds up to 15 layers; the model has 16"), std::string::npos);
  EXPECT_NE(says(2, {16, 0}).find("0 layers for a stage"), std::string::npos);
}

}  // namespace
}  // namespace trireme
