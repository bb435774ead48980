#include "models/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

constexpr const char* kModels[] = {"stories260K", "tiny-llama3",      "tiny-qwen2",
                                   "tiny-qwen3",  "tiny-mistral-swa", "tiny-starcoder2"};

ModelConfig ConfigOf(const std::string& model) {
  auto config = LoadModelConfig(GoldenDir(model));
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

std::unique_ptr<WeightLoader> OpenLoader(const std::string& dir) {
  auto loader = WeightLoader::Open(dir);
  EXPECT_TRUE(loader.ok()) << loader.status();
  return std::move(*loader);
}

Shape PieceShape(const WeightSpec& spec, int part, int parts) {
  Shape shape = spec.shape;
  if (spec.split != Split::kNone) {
    shape.dims[spec.split == Split::kCols ? 1 : 0] = PieceOfSpec(spec, part, parts).size();
  }
  return shape;
}

std::vector<float> LoadFloats(WeightLoader& loader, const WeightSpec& spec, int part, int parts) {
  const Shape shape = PieceShape(spec, part, parts);
  std::vector<float> out(shape.elements());
  const absl::Status status =
      loader.Load(spec, part, parts, TensorView(out.data(), DType::kF32, shape));
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

struct StoredTensor {
  std::string name;
  DType dtype;
  std::vector<int64_t> dims;
};

// A file of zeros.
void WriteFile(const std::string& path, const std::vector<StoredTensor>& tensors) {
  std::vector<SafetensorsWriter::Declared> declared;
  int64_t bytes = 0;
  for (const StoredTensor& tensor : tensors) {
    declared.push_back({tensor.name, tensor.dtype, tensor.dims});
    bytes +=
        std::accumulate(tensor.dims.begin(), tensor.dims.end(), int64_t{1}, std::multiplies<>()) *
        static_cast<int64_t>(SizeOf(tensor.dtype));
  }
  auto writer = SafetensorsWriter::Create(path, declared);
  ASSERT_TRUE(writer.ok()) << writer.status();
  const std::string zeros(bytes, '\0');
  ASSERT_TRUE((*writer)->Append(zeros.data(), bytes).ok());
  ASSERT_TRUE((*writer)->Finish().ok());
}

TEST(WeightSpecsTest, TableCoversEveryTensorOfEveryGoldenCheckpoint) {
  for (const char* model : kModels) {
    const std::vector<WeightSpec> specs = AllWeightSpecs(ConfigOf(model));
    const auto file = SafetensorsFile::Open(GoldenDir(model) + "/model.safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    std::map<std::string, TensorEntry> left = (*file)->header().tensors;
    for (const WeightSpec& spec : specs) {
      ASSERT_TRUE(left.contains(spec.name)) << model << " " << spec.name;
      left.erase(spec.name);
    }
    EXPECT_TRUE(left.empty()) << model << " has " << left.begin()->first;
    EXPECT_TRUE(OpenLoader(GoldenDir(model))->Check(specs).ok());
  }
}

TEST(WeightSpecsTest, TiedHeadIsTheEmbedding) {
  const DecoderWeightSpecs tied = WeightSpecsOf(ConfigOf("tiny-llama3"));
  EXPECT_EQ(tied.head.name, "model.embed_tokens.weight");
  const DecoderWeightSpecs own = WeightSpecsOf(ConfigOf("tiny-qwen3"));
  EXPECT_EQ(own.head.name, "lm_head.weight");
}

TEST(WeightSpecsTest, KvHeadsAreSharedByNeighboursWhenThereAreFewerThanRanks) {
  const DecoderWeightSpecs specs = WeightSpecsOf(ConfigOf("tiny-qwen3"));  // 4 KV heads of 16
  const WeightSpec& k = specs.layers[0].k;
  for (int part = 0; part < 8; ++part) {
    EXPECT_EQ(PieceOfSpec(k, part, 8), (Range{part / 2 * 16, part / 2 * 16 + 16})) << part;
    EXPECT_EQ(PieceOfSpec(specs.layers[0].q, part, 8), (Range{part * 16, part * 16 + 16}));
  }
  EXPECT_EQ(PieceOfSpec(k, 1, 4), (Range{16, 32}));
  EXPECT_EQ(PieceOfSpec(k, 1, 2), (Range{32, 64}));
}

TEST(WeightSpecsTest, BiasesOfRowParallelLayersAreTheFirstRanks) {
  const LayerWeightSpecs layer = WeightSpecsOf(ConfigOf("tiny-starcoder2")).layers[0];
  for (const WeightSpec& bias : {layer.o_bias, layer.down_bias}) {
    EXPECT_EQ(PieceOfSpec(bias, 0, 4), (Range{0, 64}));
    for (int part = 1; part < 4; ++part) EXPECT_EQ(PieceOfSpec(bias, part, 4).size(), 0);
  }
  EXPECT_EQ(PieceOfSpec(layer.up_bias, 1, 4), (Range{64, 128}));
}

TEST(WeightSpecsTest, VocabularyIsCutUnevenly) {
  const WeightSpec embedding = WeightSpecsOf(ConfigOf("tiny-qwen3")).embedding;
  int64_t at = 0;
  for (int part = 0; part < 4; ++part) {
    const Range piece = PieceOfSpec(embedding, part, 4);
    EXPECT_EQ(piece.begin, at);
    at = piece.end;
  }
  EXPECT_EQ(at, 515);
}

TEST(CheckTensorParallelTest, NamesFlagAndNumbers) {
  const ModelConfig config =
      ConfigOf("tiny-qwen3");  // 8 heads, 4 KV heads, intermediate 128, 4 layers
  for (const int tp : {1, 2, 4, 8}) EXPECT_TRUE(CheckTensorParallel(config, {tp, 1, 1}).ok()) << tp;
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ExpectError(CheckTensorParallel(config, {3, 1, 1}), kInvalid,
              "--tp 3 does not divide the model's num_attention_heads 8; --tp can be 1, 2, 4, 8");
  ExpectError(CheckTensorParallel(config, {16, 1, 1}), kInvalid,
              "--tp 16 does not divide the model's num_attention_heads 8; --tp can be 1, 2, 4, 8");
  ExpectError(CheckTensorParallel(config, {1, 5, 1}), kInvalid,
              "--pp 5 is more than the model's 4 layers; every stage needs one");
  ExpectError(CheckTensorParallel(config, {0, 1, 1}), kInvalid,
              "--tp 0 --pp 1 --dp 1: each must be at least 1");
  ModelConfig odd = config;
  odd.intermediate_size = 172;
  ExpectError(CheckTensorParallel(odd, {8, 1, 1}), kInvalid,
              "--tp 8 does not divide the model's intermediate_size 172; --tp can be 1, 2, 4");
  ModelConfig kv = config;
  kv.num_heads = 12;
  kv.num_kv_heads = 3;
  kv.intermediate_size = 144;
  ExpectError(CheckTensorParallel(kv, {4, 1, 1}), kInvalid,
              "--tp 4 does not divide the model's num_key_value_heads 3 (nor is it a multiple); "
              "--tp can be 1, 3, 6, 12");
}

// Numbers read from the files by an independent reader.
TEST(WeightLoaderTest, ValuesOfGoldenTensors) {
  const struct {
    const char* model;
    const char* name;
    int64_t row, column;
    float value;
  } expected[] = {
      {"stories260K", "model.layers.1.self_attn.k_proj.weight", 5, 7, -0.2092140018939972f},
      {"stories260K", "model.layers.1.mlp.down_proj.weight", 63, 171, 0.12867814302444458f},
      {"tiny-llama3", "model.layers.1.self_attn.k_proj.weight", 63, 127, -0.12890625f},
      {"tiny-llama3", "model.layers.1.mlp.down_proj.weight", 64, 80, 0.111328125f},
      {"tiny-qwen2", "model.layers.1.mlp.up_proj.weight", 88, 32, -0.1845703125f},
      {"tiny-qwen3", "model.layers.1.mlp.up_proj.weight", 5, 7, 0.001983642578125f},
      {"tiny-mistral-swa", "model.layers.1.mlp.down_proj.weight", 5, 7, -0.08837890625f},
      {"tiny-starcoder2", "model.layers.1.mlp.c_proj.weight", 5, 7, -0.0595703125f},
  };
  for (const auto& e : expected) {
    const auto loader = OpenLoader(GoldenDir(e.model));
    for (const WeightSpec& spec : AllWeightSpecs(ConfigOf(e.model))) {
      if (spec.name != e.name) continue;
      const std::vector<float> all = LoadFloats(*loader, spec, 0, 1);
      EXPECT_EQ(all[e.row * spec.shape[1] + e.column], e.value) << e.model << " " << e.name;
    }
  }
}

TEST(WeightLoaderTest, PiecesReassembleToTheWholeTensor) {
  for (const char* model : kModels) {
    const ModelConfig config = ConfigOf(model);
    const auto loader = OpenLoader(GoldenDir(model));
    for (const WeightSpec& spec : AllWeightSpecs(config)) {
      const std::vector<float> whole = LoadFloats(*loader, spec, 0, 1);
      const int64_t columns = TensorView::RowElements(spec.shape);
      for (const int parts : {2, 4, 8}) {
        if (!CheckTensorParallel(config, {parts, 1, 1}).ok()) continue;
        std::vector<int> seen(whole.size(), 0);
        for (int part = 0; part < parts; ++part) {
          const std::vector<float> piece = LoadFloats(*loader, spec, part, parts);
          const Range range = PieceOfSpec(spec, part, parts);
          const bool by_columns = spec.split == Split::kCols;
          const int64_t piece_columns = by_columns ? range.size() : columns;
          for (size_t i = 0; i < piece.size(); ++i) {
            const int64_t row = i / piece_columns + (by_columns ? 0 : range.begin);
            const int64_t column = i % piece_columns + (by_columns ? range.begin : 0);
            ASSERT_EQ(piece[i], whole[row * columns + column])
                << spec.name << " " << part << "/" << parts;
            ++seen[row * columns + column];
          }
        }
        const int copies = seen[0];
        EXPECT_TRUE(copies == 1 || spec.split == Split::kNone || spec.replicate) << spec.name;
        EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [&](int n) { return n == copies; }))
            << spec.name;
      }
    }
  }
}

// Only the piece's bytes are read: over all ranks, each cut tensor once and each whole one `tp`
// times.
TEST(WeightLoaderTest, BytesReadAreExactlyThePieces) {
  for (const char* model : kModels) {
    const ModelConfig config = ConfigOf(model);
    for (const int tp : {1, 2, 4}) {
      int64_t expected = 0, actual = 0;
      for (const WeightSpec& spec : AllWeightSpecs(config)) {
        expected += spec.shape.elements() * 4 * (spec.split == Split::kNone ? tp : 1);
      }
      for (int part = 0; part < tp; ++part) {
        const auto loader = OpenLoader(GoldenDir(model));
        EXPECT_EQ(loader->bytes_read(), 0);
        for (const WeightSpec& spec : AllWeightSpecs(config)) LoadFloats(*loader, spec, part, tp);
        actual += loader->bytes_read();
        if (tp == 1) {
          EXPECT_EQ(loader->bytes_read(), loader->total_bytes());
        }
      }
      EXPECT_EQ(actual, expected) << model << " tp " << tp;
    }
  }
}

TEST(WeightLoaderTest, EveryFloatTypeToEveryOther) {
  TempDir dir;
  // More than one conversion chunk of 1 MiB, with values that all three types hold exactly.
  const int64_t rows = 700, columns = 1000;
  std::vector<float> values(rows * columns);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(static_cast<int>(i % 255) - 127) / 64.0f;
  std::vector<BF16> bf16(values.size());
  std::vector<F16> f16(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    bf16[i] = FromFloat<BF16>(values[i]);
    f16[i] = FromFloat<F16>(values[i]);
  }
  const auto bytes_of = [&](DType dtype) -> const void* {
    if (dtype == DType::kF32) return values.data();
    return dtype == DType::kBF16 ? static_cast<const void*>(bf16.data()) : f16.data();
  };
  for (const DType stored : {DType::kF32, DType::kBF16, DType::kF16}) {
    const std::string path = dir / "model.safetensors";
    auto writer = SafetensorsWriter::Create(path, {{"w", stored, {rows, columns}}});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE((*writer)->Append(bytes_of(stored), values.size() * SizeOf(stored)).ok());
    ASSERT_TRUE((*writer)->Finish().ok());
    for (const DType wanted : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const Split split : {Split::kNone, Split::kCols}) {
        const auto loader = OpenLoader(dir.path());
        const WeightSpec spec{"w", {rows, columns}, split, 1, false, ""};
        const int parts = split == Split::kNone ? 1 : 4;
        const Shape shape = PieceShape(spec, parts - 1, parts);
        std::vector<char> out(shape.elements() * SizeOf(wanted));
        ASSERT_TRUE(
            loader->Load(spec, parts - 1, parts, TensorView(out.data(), wanted, shape)).ok());
        EXPECT_EQ(loader->bytes_read(), shape.elements() * static_cast<int64_t>(SizeOf(stored)));
        const size_t row_bytes = shape[1] * SizeOf(wanted);
        for (int64_t row = 0; row < rows; ++row) {
          const char* from = static_cast<const char*>(bytes_of(wanted)) +
                             ((row + 1) * columns - shape[1]) * SizeOf(wanted);
          ASSERT_EQ(std::memcmp(out.data() + row * row_bytes, from, row_bytes), 0)
              << Name(stored) << " to " << Name(wanted) << " row " << row;
        }
      }
    }
  }
}

TEST(WeightLoaderTest, CheckRefusesWhatWouldBeLeftOut) {
  TempDir dir;
  const auto check = [&](const std::string& name) {
    WriteFile(dir / "model.safetensors",
              {{"model.norm.weight", DType::kF32, {2}}, {name, DType::kF32, {2}}});
    return OpenLoader(dir.path())->Check({{"model.norm.weight", {2}, Split::kNone, 1, false, ""}});
  };
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up.weight"}) {
    ExpectError(check(name), absl::StatusCode::kInvalidArgument,
                absl::StrCat(dir.path(), ": tensor \"", name,
                             "\" in model.safetensors is none that config.json asks for: correct "
                             "config.json (num_hidden_layers, attention_bias, mlp_bias, use_bias, "
                             "architectures), or take the tensor out"));
  }
  for (const char* name :
       {"model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "v_head.summary.weight"})
    EXPECT_TRUE(check(name).ok()) << name;
}

TEST(WeightLoaderTest, CheckFindsWhatIsMissingOrWrong) {
  TempDir dir;
  WriteFile(dir / "model.safetensors",
            {{"a", DType::kF32, {2, 3}}, {"b", DType::kI64, {2}}, {"c", DType::kF32, {6}}});
  const auto loader = OpenLoader(dir.path());
  const WeightSpec a{"a", {2, 3}, Split::kNone, 1, false, "vocab_size, hidden_size"};
  WeightSpec wide = a;
  wide.shape = {2, 4};
  WeightSpec flat = a;
  flat.name = "c";
  const WeightSpec b{"b", {2}, Split::kNone, 1, false, "hidden_size"};
  const WeightSpec none{"none", {2}, Split::kNone, 1, false, "hidden_size"};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_TRUE(loader->Check({a}).ok());
  EXPECT_EQ(loader->PieceBytes(a, 0, 1), a.shape.elements() * 4);
  ExpectError(
      loader->Check({a, wide}), kInvalid,
      dir.path() +
          ": tensor \"a\" in model.safetensors has shape [2, 3]; config.json asks for [2, 4] "
          "(vocab_size, hidden_size)");
  ExpectError(loader->Check({flat}), kInvalid,
              dir.path() +
                  ": tensor \"c\" in model.safetensors has shape [6]; config.json asks for [2, 3] "
                  "(vocab_size, hidden_size)");
  ExpectError(
      loader->Check({b}), kInvalid,
      dir.path() +
          ": tensor \"b\" in model.safetensors is of dtype i64; weights must be F32, BF16 or F16");
  ExpectError(
      loader->Check({none, b, wide}), absl::StatusCode::kNotFound,
      dir.path() +
          ": tensor \"none\" is missing; config.json asks for it (and 2 more tensors are wrong)");
  float unused[8];
  ExpectError(
      loader->Load(wide, 0, 1, TensorView(unused, DType::kF32, {2, 4})), kInvalid,
      dir.path() +
          ": tensor \"a\" in model.safetensors has shape [2, 3]; config.json asks for [2, 4] "
          "(vocab_size, hidden_size)");
}

TEST(WeightLoaderTest, ForeignTypeIsRefusedOnlyWhenAskedFor) {
  TempDir dir;
  const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                             R"("q":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[4,8]}})";
  const uint64_t length = header.size();
  dir.Write("model.safetensors",
            std::string(reinterpret_cast<const char*>(&length), 8) + header + "12345678");
  const auto loader = OpenLoader(dir.path());
  EXPECT_TRUE(loader->Check({{"a", {1}, Split::kNone, 1, false, ""}}).ok());
  ExpectError(loader->Check({{"q", {4}, Split::kNone, 1, false, ""}}),
              absl::StatusCode::kInvalidArgument,
              dir.path() +
                  ": tensor \"q\" in model.safetensors is of dtype F8_E4M3; weights must be F32, "
                  "BF16 or F16");
}

class IndexTest : public ::testing::Test {
 protected:
  IndexTest() {
    WriteFile(dir_ / "s1.safetensors", {{"a", DType::kF32, {2}}});
    WriteFile(dir_ / "s2.safetensors", {{"b", DType::kF32, {3}}, {"extra", DType::kF32, {1}}});
  }
  absl::Status OpenWith(const std::string& index) {
    dir_.Write("model.safetensors.index.json", index);
    return WeightLoader::Open(dir_.path()).status();
  }
  const std::string index_path() const { return dir_ / "model.safetensors.index.json"; }
  TempDir dir_;
};

TEST_F(IndexTest, ReadsShards) {
  EXPECT_TRUE(
      OpenWith(
          R"({"metadata":{"total_size":20},"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}})")
          .ok());
  const auto loader = OpenLoader(dir_.path());
  EXPECT_EQ(loader->total_bytes(), 24);
  EXPECT_EQ(LoadFloats(*loader, {"b", {3}, Split::kNone, 1, false, ""}, 0, 1),
            std::vector<float>(3, 0.0f));
}

TEST_F(IndexTest, FaultsAreNamed) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ExpectError(
      OpenWith(R"({"weight_map":{"a":"s1.safetensors","b":"s9.safetensors"}})"),
      absl::StatusCode::kNotFound,
      index_path() + ": names the shard \"s9.safetensors\", which is not in " + dir_.path());
  ExpectError(OpenWith(R"({"weight_map":{"z":"s1.safetensors"}})"), kInvalid,
              index_path() + ": lists tensor \"z\" in s1.safetensors, which does not hold it");
  ExpectError(OpenWith(R"({"weight_map":{"a":"s2.safetensors","b":"s1.safetensors"}})"), kInvalid,
              index_path() + ": lists tensor \"a\" in s2.safetensors, which does not hold it");
  for (const char* name : {"../s1.safetensors", "/etc/passwd", "..", "x/s1.safetensors", ""}) {
    ExpectError(
        OpenWith(std::string(R"({"weight_map":{"a":")") + name + "\"}}"), kInvalid,
        index_path() +
            ": weight_map: \"a\" must map to the plain name of a file in this directory, not \"" +
            name + "\"");
  }
  ExpectError(
      OpenWith(R"({"weight_map":{"a":7}})"), kInvalid,
      index_path() +
          ": weight_map: \"a\" must map to the plain name of a file in this directory, not \"\"");
  const std::string map_line =
      index_path() + ": weight_map: must be an object that maps tensor names to file names";
  ExpectError(OpenWith(R"({"metadata":{}})"), kInvalid, map_line);
  ExpectError(OpenWith(R"({"weight_map":[]})"), kInvalid, map_line);
  ExpectError(OpenWith("{"), kInvalid, index_path() + ": is not valid JSON (at byte 2 of 1)");
  WriteFile(dir_ / "s3.safetensors", {{"a", DType::kF32, {2}}});
  ExpectError(OpenWith(R"({"weight_map":{"a":"s1.safetensors","b":"s3.safetensors"}})"), kInvalid,
              dir_.path() + ": tensor \"a\" is in both s1.safetensors and s3.safetensors");
}

TEST(WeightLoaderTest, DirectoryWithoutWeights) {
  TempDir dir;
  ExpectError(WeightLoader::Open(dir.path()).status(), absl::StatusCode::kNotFound,
              dir.path() +
                  ": has neither model.safetensors nor model.safetensors.index.json; weights are "
                  "read from these");
}

}  // namespace
}  // namespace trireme
