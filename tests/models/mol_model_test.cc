// The head against the golden files of the published implementation: the double twin to 1e-12, the
// model in f32 to 5e-5; mutations that the golden files must catch; and what a bad directory says.
#include "models/mol_model.h"

#include <cmath>

#include "models/mol_checkpoint.h"
#include "tests/golden_mol.h"
#include "tests/models/temp_dir.h"
#include "tests/testing.h"

namespace trireme {
namespace {

double LargestDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN is large
  }
  return largest;
}

std::vector<int64_t> UserIds(const GoldenMol& golden) {
  const auto it = golden.integers.find("input.user_ids");
  return it == golden.integers.end() ? std::vector<int64_t>() : it->second;
}

reference::MolResult Twin(const GoldenMol& golden, const reference::MolCase& mol) {
  return reference::MixtureOfLogits(mol, golden.values("input.query_embeddings"), UserIds(golden),
                                    golden.values("input.item_embeddings"), golden.batch,
                                    golden.items);
}

class MolGoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  const GoldenMol golden_ = ReadGoldenMol(GetParam());
};

TEST_P(MolGoldenTest, TheTwinAgreesTo1e12) {
  const reference::MolResult result = Twin(golden_, golden_.Case());
  const std::pair<const char*, const reference::Doubles*> parts[] = {
      {"query_components", &result.query_components},
      {"item_components", &result.item_components},
      {"gating_query_partial", &result.query_gates},
      {"gating_item_partial", &result.item_gates},
      {"logits", &result.logits},
      {"gating_weights", &result.gate_weights},
      {"scores", &result.scores}};
  int compared = 0;
  for (const auto& [name, values] : parts) {
    const auto it = golden_.tensors.find(std::string("ref.") + name);
    if (it == golden_.tensors.end()) continue;
    EXPECT_LE(LargestDifference(*values, it->second.values), 1e-12) << name;
    ++compared;
  }
  EXPECT_GE(compared, 4);
}

// Each of these mistakes has been made somewhere: the golden numbers must not forgive one.
TEST_P(MolGoldenTest, MutationsAreCaught) {
  const auto differs = [&](const char* what, const reference::MolCase& mol) {
    EXPECT_GT(LargestDifference(Twin(golden_, mol).scores, golden_.values("ref.scores")), 1e-6)
        << what;
  };
  reference::MolCase mol = golden_.Case();
  mol.temperature *= 1.0001;
  differs("temperature", mol);
  mol = golden_.Case();
  mol.l2_norm = false;
  differs("l2 norm", mol);
  if (mol.concat_relu) return;
  mol = golden_.Case();
  mol.query_gelu = !mol.query_gelu;
  differs("the GLU's nonlinearity", mol);
  mol = golden_.Case();
  mol.weights["_gating_fn._qi_partial_module.3.bias"].values[0] += 0.5;
  differs("the cross gate's bias", mol);
  if (!mol.uid_hash_sizes.empty()) {
    mol = golden_.Case();
    mol.uid_hash_sizes[0] -= 1;
    differs("the user-id row", mol);
  }
  // Item component major instead of query component major.
  mol = golden_.Case();
  reference::MolTensor& w = mol.weights["_gating_fn._qi_partial_module.1.weight"];
  const reference::MolTensor original = w;
  const int64_t l = w.dims[1], px = mol.item_components, pq = mol.query_components;
  for (int64_t h = 0; h < w.dims[0]; ++h) {
    for (int64_t n = 0; n < pq; ++n) {
      for (int64_t m = 0; m < px; ++m) {
        w.values[h * l + n * px + m] = original.values[h * l + m * pq + n];
      }
    }
  }
  differs("the order of logits", mol);
}

TEST_P(MolGoldenTest, TheModelAgreesTo5e5) {
  const TempDir dir;
  golden_.WriteModel(dir / "m");
  for (const int threads : {1, 2}) {
    const TestDevice device(threads);
    Stream& stream = device.stream();
    const auto model = MolModel::Load(dir / "m", stream);
    ASSERT_TRUE(model.ok()) << model.status();
    const MolShape& shape = (*model)->shape();
    const int64_t width = shape.component_dim, g = shape.gate_width();
    const auto input = [&](const char* name, int64_t rows, int64_t columns) {
      Tensor tensor = device.Zeros(DType::kF32, {rows, columns});
      const std::vector<float> values = golden_.floats(name);
      stream.Copy(tensor.view().data, values.data(), values.size() * sizeof(float));
      return tensor;
    };
    const Tensor q = input("input.query_embeddings", golden_.batch, golden_.config.query_dim);
    const Tensor x = input("input.item_embeddings", golden_.items, golden_.config.item_dim);
    auto arena =
        Arena::Create(device.device(), (*model)->ArenaBytes(golden_.items + golden_.batch));
    const Tensor qc = device.Zeros(DType::kF32, {golden_.batch, shape.query_components * width});
    const Tensor gq = device.Zeros(DType::kF32, {golden_.batch, g});
    const Tensor xc = device.Zeros(DType::kF32, {golden_.items, shape.item_components * width});
    const Tensor gi = device.Zeros(DType::kF32, {golden_.items, g});
    const std::vector<int32_t> users = (*model)->UserRows(UserIds(golden_));
    const ConstTensorView rows(users.data(), DType::kI32, {(*model)->user_tables(), golden_.batch});
    (*model)->ProjectQueries(stream, q.view(), rows, *arena, qc.view(), gq.view());
    (*model)->ProjectItems(stream, x.view(), *arena, xc.view(), gi.view());
    EXPECT_EQ(arena->used(), 0u);
    EXPECT_LE(LargestDifference(ToDoubles(qc.view()), golden_.values("ref.query_components")),
              2e-6);
    EXPECT_LE(LargestDifference(ToDoubles(xc.view()), golden_.values("ref.item_components")), 2e-6);
    if (golden_.tensors.count("ref.gating_query_partial") > 0) {
      EXPECT_LE(LargestDifference(ToDoubles(gq.view()), golden_.values("ref.gating_query_partial")),
                2e-5);
      EXPECT_LE(LargestDifference(ToDoubles(gi.view()), golden_.values("ref.gating_item_partial")),
                2e-5);
    }
    // An item's bits do not depend on which others are projected with it.
    const Tensor one_c = device.Zeros(DType::kF32, {1, xc.view().dim(1)});
    const Tensor one_g = device.Zeros(DType::kF32, {1, g});
    (*model)->ProjectItems(stream, x.view().Rows(17, 1), *arena, one_c.view(), one_g.view());
    ExpectSameBits(one_c.view(), xc.view().Rows(17, 1));
    ExpectSameBits(one_g.view(), gi.view().Rows(17, 1));
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, MolGoldenTest, ::testing::ValuesIn(GoldenMolNames()),
                         [](const auto& info) { return info.param; });

class MolLoadTest : public ::testing::Test {
 protected:
  MolLoadTest() : golden_(ReadGoldenMol("tiny_2x2x8")) {}
  std::string Error() {
    golden_.WriteModel(dir_ / "m");
    return std::string(MolModel::Load(dir_ / "m", device_.stream()).status().message());
  }
  reference::MolTensor& Weight(const std::string& key) { return golden_.tensors["model." + key]; }
  TempDir dir_;
  TestDevice device_;
  GoldenMol golden_;
};

constexpr char kItemWeight[] = "_item_embeddings_fn._item_emb_proj_module.1.weight";

TEST_F(MolLoadTest, TakesTheReferencesNames) {
  EXPECT_EQ(Error(), "");
  golden_.WriteModel(dir_ / "prefixed", "module._ndp_module.");
  EXPECT_TRUE(MolModel::Load(dir_ / "prefixed", device_.stream()).ok());
  for (const char* part : {"weight", "bias"}) {
    const std::string key = std::string("_item_embeddings_fn._item_emb_proj_module.1.") + part;
    golden_.tensors[std::string("model._item_proj_module.1.") + part] = Weight(key);
    golden_.tensors.erase("model." + key);
  }
  EXPECT_EQ(Error(), "");
}

TEST_F(MolLoadTest, NamesWhatIsWrong) {
  const reference::MolTensor saved = Weight(kItemWeight);
  golden_.tensors.erase(std::string("model.") + kItemWeight);
  EXPECT_NE(Error().find("_item_emb_proj_module.1.weight\" [16, 10] is missing"),
            std::string::npos);
  Weight(kItemWeight) = {{10, 16}, saved.values};
  EXPECT_NE(Error().find("1.weight\": is [10, 16]; the config.json beside it needs [16, 10]"),
            std::string::npos);
  Weight(kItemWeight) = saved;
  Weight(kItemWeight).values[7] = NAN;
  EXPECT_NE(Error().find("1.weight\": holds NaN or infinite"), std::string::npos);
  Weight(kItemWeight) = saved;
  Weight("_gating_fn._something.weight") = {{1}, {1.0}};
  EXPECT_NE(Error().find("_something.weight\" is no part of the head"), std::string::npos);
}

TEST_F(MolLoadTest, NamesATruncatedFile) {
  golden_.WriteModel(dir_ / "m");
  const std::string path = dir_ / "m/model.safetensors";
  std::filesystem::resize_file(path, 2000);
  const auto model = MolModel::Load(dir_ / "m", device_.stream());
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("model.safetensors"), std::string::npos);
}

std::string ConfigError(const std::string& json) {
  return std::string(ParseMolConfig(json, "c.json").status().message());
}

TEST(MolConfigTest, ReadsBackWhatItWrites) {
  for (const std::string& name : MolRecipeNames()) {
    const MolConfig config = MolRecipeConfig(name).value();
    const auto again = ParseMolConfig(MolConfigJson(config), "c.json");
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(MolConfigJson(*again), MolConfigJson(config));
  }
  const MolConfig notebook = ReadGoldenMol("notebook_concat_c4").config;
  const auto again = ParseMolConfig(MolConfigJson(notebook), "c.json");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(MolConfigJson(*again), MolConfigJson(notebook));
}

TEST(MolConfigTest, NamesTheField) {
  const std::string good = MolConfigJson(MolRecipeConfig("mol-8x4x64").value());
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string json = good;
    json.replace(json.find(from), from.size(), to);
    return ConfigError(json);
  };
  EXPECT_EQ(ConfigError(good), "");
  EXPECT_NE(with("\"mol\"", "\"llama\"").find("model_type"), std::string::npos);
  EXPECT_NE(with("\"query_dim\": 50", "\"query_dim\": 0").find("query_dim: is 0"),
            std::string::npos);
  EXPECT_NE(with("\"component_dim\": 64,", "").find("component_dim: is missing"),
            std::string::npos);
  EXPECT_NE(with("\"item_hidden\"", "\"item_hiden\"").find("item_hiden"), std::string::npos);
  EXPECT_NE(with("0.05", "-1").find("temperature"), std::string::npos);
  EXPECT_NE(with("\"glu_silu\"", "\"glu_silu_ln\"").find("gating: is \"glu_silu_ln\""),
            std::string::npos);
  EXPECT_NE(with("\"all\"", "\"diagonal\"").find("needs as many"), std::string::npos);
  EXPECT_NE(with("6040", "0").find("uid_hash_sizes"), std::string::npos);
  EXPECT_NE(with("128", "9223372036854775807").find("gating_query_hidden"), std::string::npos);
}

TEST(MolCheckpointTest, MakesHeadsThatLoad) {
  const TempDir dir;
  const TestDevice device;
  for (const std::string& name : MolRecipeNames()) {
    const MolConfig config = MolRecipeConfig(name).value();
    ASSERT_TRUE(MakeMolCheckpoint(config, dir / name, 1).ok());
    const auto model = MolModel::Load(dir / name, device.stream());
    EXPECT_TRUE(model.ok()) << model.status();
  }
  EXPECT_FALSE(MolRecipeConfig("mol-1x1x1").ok());
  EXPECT_EQ(MakeMolCheckpoint(MolRecipeConfig("mol-8x8x32").value(), dir.path(), 1).code(),
            absl::StatusCode::kAlreadyExists);
}

}  // namespace
}  // namespace trireme
