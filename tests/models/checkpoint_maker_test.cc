#include "models/checkpoint_maker.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <set>

#include "absl/strings/string_view.h"
#include "models/memory_plan.h"
#include "models/weights.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

// The smallest recipe; one layer of it and the embedding are 0.30 GB in bf16.
CheckpointRecipe Small(const std::string& out_dir) {
  return {.like = "qwen2.5-0.5b", .layers = 1, .dtype = DType::kBF16, .out_dir = out_dir};
}

std::vector<float> LoadWhole(WeightLoader& loader, const WeightSpec& spec) {
  std::vector<float> out(spec.shape.elements());
  const absl::Status status =
      loader.Load(spec, 0, 1, TensorView(out.data(), DType::kF32, spec.shape));
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

TEST(CheckpointMakerTest, EveryRecipeIsAConfigThatReadsBack) {
  ASSERT_EQ(CheckpointRecipeNames().size(), 12u);
  for (const std::string& name : CheckpointRecipeNames()) {
    const auto config = CheckpointRecipeConfig(name);
    ASSERT_TRUE(config.ok()) << config.status();
    const std::string text = ConfigJson(*config);
    const auto again = ParseModelConfig(text, name);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(ConfigJson(*again), text);
    EXPECT_EQ(TotalParameters(*again), TotalParameters(*config));
    EXPECT_EQ(again->qkv_bias, config->qkv_bias);
    EXPECT_EQ(again->qk_norm, config->qk_norm);
    EXPECT_EQ(again->norm, config->norm);
    EXPECT_EQ(again->norm_eps, config->norm_eps);
    EXPECT_EQ(again->mlp, config->mlp);
    EXPECT_EQ(again->SlidingWindow(0), config->SlidingWindow(0));
    EXPECT_EQ(RopeFrequencies(*again), RopeFrequencies(*config));
    EXPECT_EQ(again->eos_token_ids, config->eos_token_ids);
  }
}

TEST(CheckpointMakerTest, ShardsReadBackAsTheModel) {
  TempDir dir;
  CheckpointRecipe recipe = Small(dir / "new/model");
  recipe.max_shard_bytes = 20'000'000;
  int64_t last = 0, total = 0;
  const absl::Status made = MakeCheckpoint(recipe, [&](int64_t done, int64_t of) {
    EXPECT_GT(done, last);
    last = done;
    total = of;
  });
  ASSERT_TRUE(made.ok()) << made;
  const auto config = LoadModelConfig(recipe.out_dir);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_layers, 1);
  EXPECT_EQ(total, 2 * TotalParameters(*config));
  EXPECT_EQ(last, total);

  auto loader = WeightLoader::Open(recipe.out_dir);
  ASSERT_TRUE(loader.ok()) << loader.status();
  EXPECT_EQ((*loader)->total_bytes(), total);
  const DecoderWeightSpecs specs = WeightSpecsOf(*config);
  ASSERT_TRUE((*loader)->Check(AllWeightSpecs(*config)).ok());
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(recipe.out_dir))
    names.insert(entry.path().filename());
  EXPECT_EQ(names,
            (std::set<std::string>{
                "config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"}));

  EXPECT_EQ(LoadWhole(**loader, specs.final_norm), std::vector<float>(896, 1.0f));
  const std::vector<float> gate = LoadWhole(**loader, specs.layers[0].gate);
  double sum = 0, squares = 0;
  for (const float x : gate) {
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += double{x} * x;
  }
  // 4.4 million draws: the mean has a standard error of 1e-5 and the deviation of 7e-6; the table
  // of 65536 values adds 8e-5 and 6e-5.
  const auto n = static_cast<double>(gate.size());
  EXPECT_NEAR(sum / n, 0.0, 4e-4);
  EXPECT_NEAR(std::sqrt(squares / n), 0.02, 3e-4);
  // No two rows alike, and no two tensors.
  std::set<std::vector<float>> rows;
  for (int64_t row = 0; row < 4864; ++row) {
    rows.emplace(gate.begin() + row * 896, gate.begin() + (row + 1) * 896);
  }
  EXPECT_EQ(rows.size(), 4864u);
  EXPECT_NE(LoadWhole(**loader, specs.layers[0].up), gate);
}

TEST(CheckpointMakerTest, SeedDecidesTheBytesAndTypesDiffer) {
  TempDir dir;
  const auto first_values = [&](uint64_t seed, DType dtype, const std::string& name) {
    CheckpointRecipe recipe = Small(dir / name);
    recipe.seed = seed;
    recipe.dtype = dtype;
    EXPECT_TRUE(MakeCheckpoint(recipe).ok());
    auto loader = WeightLoader::Open(recipe.out_dir);
    EXPECT_TRUE(loader.ok()) << loader.status();
    EXPECT_FALSE(std::filesystem::exists(recipe.out_dir + "/model.safetensors.index.json"));
    auto values =
        LoadWhole(**loader, WeightSpecsOf(*LoadModelConfig(recipe.out_dir)).layers[0].down);
    std::filesystem::remove_all(recipe.out_dir);
    return values;
  };
  const std::vector<float> one = first_values(1, DType::kF32, "a");
  EXPECT_EQ(first_values(1, DType::kF32, "b"), one);
  EXPECT_NE(first_values(2, DType::kF32, "c"), one);
  const std::vector<float> half = first_values(1, DType::kF16, "d");
  for (size_t i = 0; i < one.size(); ++i) ASSERT_EQ(half[i], ToFloat(FromFloat<F16>(one[i])));
}

TEST(CheckpointMakerTest, RefusalsAreOneLine) {
  TempDir dir;
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  CheckpointRecipe recipe = Small(dir / "x");
  recipe.like = "gpt-5";
  ExpectError(
      MakeCheckpoint(recipe), kInvalid,
      "no model called \"gpt-5\" is known; known are llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, "
      "llama-3.1-70b, "
      "qwen3-0.6b, qwen3-1.7b, qwen3-8b, qwen2.5-0.5b, qwen2.5-7b, mistral-7b, starcoder2-3b, "
      "tinyllama-1.1b");
  recipe = Small(dir / "x");
  recipe.layers = 5000;
  ExpectError(MakeCheckpoint(recipe), kInvalid,
              "--layers 5000: must be from 1 to 4096, or 0 for the model's own 24");
  recipe = Small(dir / "x");
  recipe.dtype = DType::kI64;
  ExpectError(MakeCheckpoint(recipe), kInvalid, "--dtype i64: must be f32, bf16 or f16");
  EXPECT_FALSE(std::filesystem::exists(dir / "x"));
  dir.Write("occupied", "");
  ExpectError(MakeCheckpoint(Small(dir / "occupied")), absl::StatusCode::kAlreadyExists,
              (dir / "occupied") + ": is not a directory; name a new or an empty one");
  ExpectError(MakeCheckpoint(Small(dir.path())), absl::StatusCode::kAlreadyExists,
              dir.path() + ": is not empty; name a new or an empty directory");
  recipe = Small(dir / "huge");
  recipe.like = "llama-3.1-70b";
  recipe.layers = 4096;
  const absl::Status huge = MakeCheckpoint(recipe);
  EXPECT_EQ(huge.code(), absl::StatusCode::kResourceExhausted) << huge;
  EXPECT_NE(huge.message().find("the checkpoint needs 7013.72 GB"), absl::string_view::npos)
      << huge;
  EXPECT_FALSE(std::filesystem::exists(dir / "huge"));
}

TEST(CheckpointMakerTest, DiskThatFillsUpLeavesNothing) {
  TempDir dir;
  CheckpointRecipe recipe = Small(dir / "m");
  recipe.max_shard_bytes = 20'000'000;
  signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit small{10'000'000, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const absl::Status status = MakeCheckpoint(recipe);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(std::string(status.message()),
            (dir / "m") + "/model-00001-of-00003.safetensors: writing: File too large");
  EXPECT_FALSE(std::filesystem::exists(dir / "m"));
}

}  // namespace
}  // namespace trireme
