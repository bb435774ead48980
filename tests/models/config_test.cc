#include "models/config.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "models/weights.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

using Json = nlohmann::ordered_json;

Json Golden(const std::string& model) {
  return Json::parse(FileBytes(GoldenDir(model) + "/config.json"));
}

absl::StatusOr<ModelConfig> Parse(const Json& json) {
  return ParseModelConfig(json.dump(), "config.json");
}

TEST(ConfigTest, Llama3) {
  const auto config = LoadModelConfig(GoldenDir("tiny-llama3"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->hidden_size, 128);
  EXPECT_EQ(config->intermediate_size, 160);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->num_heads, 8);
  EXPECT_EQ(config->num_kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->vocab_size, 512);
  EXPECT_EQ(config->max_positions, 512);
  EXPECT_EQ(config->norm_eps, 1e-5);
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rope_scaling.factor, 8.0);
  EXPECT_EQ(config->rope_scaling.original_max_position_embeddings, 64);
  EXPECT_TRUE(config->tied_head);
  EXPECT_FALSE(config->qkv_bias || config->output_bias || config->mlp_bias || config->qk_norm);
  EXPECT_EQ(config->sliding_window, 0);
  EXPECT_EQ(config->dtype, DType::kF32);
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_EQ(config->eos_token_ids, std::vector<int64_t>{2});
}

TEST(ConfigTest, Variants) {
  const auto qwen2 = LoadModelConfig(GoldenDir("tiny-qwen2"));
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_TRUE(qwen2->qkv_bias);
  EXPECT_FALSE(qwen2->output_bias || qwen2->qk_norm);
  EXPECT_EQ(qwen2->head_dim, 8);
  EXPECT_EQ(qwen2->sliding_window, 0) << "use_sliding_window is false";
  const auto qwen3 = LoadModelConfig(GoldenDir("tiny-qwen3"));
  ASSERT_TRUE(qwen3.ok()) << qwen3.status();
  EXPECT_TRUE(qwen3->qk_norm);
  EXPECT_FALSE(qwen3->qkv_bias || qwen3->tied_head);
  EXPECT_EQ(qwen3->head_dim, 16);
  const auto mistral = LoadModelConfig(GoldenDir("tiny-mistral-swa"));
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_EQ(mistral->SlidingWindow(0), 16);
  EXPECT_EQ(mistral->SlidingWindow(3), 16);
}

TEST(ConfigTest, Starcoder2) {
  const auto config = LoadModelConfig(GoldenDir("tiny-starcoder2"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->norm, NormKind::kLayer);
  EXPECT_EQ(config->norm_eps, 1e-5);
  EXPECT_EQ(config->mlp, MlpKind::kGelu);
  EXPECT_TRUE(config->qkv_bias && config->output_bias && config->mlp_bias && config->tied_head);
  EXPECT_EQ(config->SlidingWindow(0), 16);
  // What the published files leave out, and a model without biases.
  Json json = Golden("tiny-starcoder2");
  for (const char* field :
       {"tie_word_embeddings", "hidden_act", "norm_epsilon", "norm_type", "mlp_type"})
    json.erase(field);
  json["use_bias"] = false;
  json["sliding_window"] = nullptr;
  const auto other = Parse(json);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(other->tied_head);
  EXPECT_EQ(other->norm_eps, 1e-5);
  EXPECT_FALSE(other->qkv_bias || other->output_bias || other->mlp_bias);
  EXPECT_EQ(other->SlidingWindow(0), 0);
  // Norms have theirs in any case.
  EXPECT_EQ(WeightSpecsOf(*other).final_norm_bias.name, "model.norm.bias");
}

TEST(ConfigTest, SlidingWindowOfQwenStartsAtMaxWindowLayers) {
  Json json = Golden("tiny-qwen2");
  json["use_sliding_window"] = true;
  json["max_window_layers"] = 3;
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->SlidingWindow(2), 0);
  EXPECT_EQ(config->SlidingWindow(3), 32);
  json["layer_types"] = {"full_attention", "full_attention", "full_attention", "sliding_attention"};
  EXPECT_TRUE(Parse(json).ok());
  json["layer_types"] = {"sliding_attention", "full_attention", "full_attention",
                         "sliding_attention"};
  ExpectError(Parse(json).status(), absl::StatusCode::kUnimplemented,
              "config.json: layer_types: differs from what num_hidden_layers, use_sliding_window, "
              "sliding_window and "
              "max_window_layers say; only those patterns are supported");
}

TEST(ConfigTest, SpellingsOfTransformers5) {
  Json json = Golden("tiny-llama3");
  json["rope_parameters"] = json["rope_scaling"];
  json["rope_parameters"]["rope_theta"] = 12345.0;
  json.erase("rope_scaling");
  json.erase("rope_theta");
  json["dtype"] = "bfloat16";
  json.erase("torch_dtype");
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_theta, 12345.0);
  EXPECT_EQ(config->rope_scaling.factor, 8.0);
  EXPECT_EQ(config->dtype, DType::kBF16);
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 7.0}};
  const auto plain = Parse(json);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(plain->rope_theta, 7.0);
  EXPECT_EQ(plain->rope_scaling.original_max_position_embeddings, 0);
}

TEST(ConfigTest, DefaultsOfAbsentAndNullFields) {
  Json json = Golden("tiny-llama3");
  for (const char* field :
       {"num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
        "torch_dtype", "bos_token_id", "eos_token_id", "hidden_act", "attention_bias"}) {
    json.erase(field);
  }
  json["head_dim"] = nullptr;
  json["rope_scaling"] = nullptr;
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->norm_eps, 1e-6);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_FALSE(config->tied_head);
  EXPECT_EQ(config->dtype, DType::kF32);
  EXPECT_EQ(config->bos_token_id, -1);
  EXPECT_TRUE(config->eos_token_ids.empty());
}

TEST(ConfigTest, EndTokensMayBeAListAndGenerationConfigWins) {
  TempDir dir;
  Json json = Golden("tiny-llama3");
  json["eos_token_id"] = {5, 6};
  dir.Write("config.json", json.dump());
  auto config = LoadModelConfig(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_token_ids, (std::vector<int64_t>{5, 6}));
  dir.Write("generation_config.json", R"({"temperature": 0.6})");
  EXPECT_EQ(LoadModelConfig(dir.path())->eos_token_ids, (std::vector<int64_t>{5, 6}));
  dir.Write("generation_config.json", R"({"eos_token_id": [7, 8, 9]})");
  EXPECT_EQ(LoadModelConfig(dir.path())->eos_token_ids, (std::vector<int64_t>{7, 8, 9}));
  dir.Write("generation_config.json", R"({"eos_token_id": "x"})");
  ExpectError(
      LoadModelConfig(dir.path()).status(), absl::StatusCode::kInvalidArgument,
      (dir / "generation_config.json") +
          ": eos_token_id: is a string; must be an integer from 0 to 2147483647 or a list of them");
}

TEST(ConfigTest, RopeFrequenciesMatchTheReference) {
  const auto llama = LoadModelConfig(GoldenDir("tiny-llama3"));
  // From tests/golden/tiny-llama3/README.md, nine digits.
  const std::vector<double> expected = {1.0,           0.0794030092,  0.00470075387, 9.11583092e-4,
                                        1.76776695e-4, 3.42810220e-5, 6.64786987e-6, 1.28917317e-6};
  const std::vector<double> actual = RopeFrequencies(*llama);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(actual[i] / expected[i], 1.0, 5e-9) << i;
  const auto plain = RopeFrequencies(*LoadModelConfig(GoldenDir("tiny-mistral-swa")));
  ASSERT_EQ(plain.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(plain[i] * std::pow(10.0, i), 1.0, 1e-14);
}

struct Refusal {
  const char* field;
  Json value;  // discarded = the field is removed
  absl::StatusCode code;
  const char* line;
};

TEST(ConfigTest, EachBadFieldIsNamed) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  const Json removed(Json::value_t::discarded);
  const std::vector<Refusal> refusals = {
      {"hidden_size", removed, kInvalid,
       "hidden_size: is missing; must be an integer from 1 to 1048576"},
      {"hidden_size", nullptr, kInvalid,
       "hidden_size: is null; must be an integer from 1 to 1048576"},
      {"hidden_size", "128", kInvalid,
       "hidden_size: is a string; must be an integer from 1 to 1048576"},
      {"hidden_size", 128.5, kInvalid,
       "hidden_size: is a fraction; must be an integer from 1 to 1048576"},
      {"hidden_size", 0, kInvalid, "hidden_size: is 0; must be an integer from 1 to 1048576"},
      {"intermediate_size", -5, kInvalid,
       "intermediate_size: is -5; must be an integer from 1 to 4194304"},
      {"num_hidden_layers", 100000, kInvalid,
       "num_hidden_layers: is 100000; must be an integer from 1 to 4096"},
      {"num_attention_heads", 1 << 20, kInvalid,
       "num_attention_heads: is 1048576; must be an integer from 1 to 4096"},
      {"vocab_size", std::numeric_limits<uint64_t>::max(), kInvalid,
       "vocab_size: is 18446744073709551615; must be an integer from 1 to 16777216"},
      {"vocab_size", std::numeric_limits<int64_t>::max(), kInvalid,
       "vocab_size: is 9223372036854775807; must be an integer from 1 to 16777216"},
      {"max_position_embeddings", true, kInvalid,
       "max_position_embeddings: is a boolean; must be an integer from 1 to 1073741824"},
      {"num_key_value_heads", 3, kInvalid,
       "num_key_value_heads: is 3; must divide num_attention_heads, 8"},
      {"head_dim", 15, kInvalid, "head_dim: is 15; must be even (rotary pairs)"},
      {"head_dim", 0, kInvalid, "head_dim: is 0; must be an integer from 2 to 4096"},
      {"rms_norm_eps", 0.0, kInvalid, "rms_norm_eps: is 0; must be a number from 1e-12 to 1"},
      {"rms_norm_eps", "small", kInvalid,
       "rms_norm_eps: is a string; must be a number from 1e-12 to 1"},
      {"rope_theta", -1.0, kInvalid, "rope_theta: is -1; must be a number from 1 to 1e+15"},
      {"rope_scaling", "llama3", kInvalid, "rope_scaling: is a string; must be an object or null"},
      {"rope_scaling",
       {{"rope_type", "yarn"}, {"factor", 4.0}},
       kUnimplemented,
       "rope_scaling.rope_type: \"yarn\" is not supported; supported are \"default\" and "
       "\"llama3\""},
      {"rope_scaling",
       {{"type", "linear"}, {"factor", 4.0}},
       kUnimplemented,
       "rope_scaling.rope_type: \"linear\" is not supported; supported are \"default\" and "
       "\"llama3\""},
      {"rope_scaling",
       {{"rope_type", "llama3"},
        {"factor", 4.0},
        {"low_freq_factor", 4},
        {"high_freq_factor", 1},
        {"original_max_position_embeddings", 64}},
       kInvalid,
       "rope_scaling.high_freq_factor: is 1; must be more than low_freq_factor, 4"},
      {"rope_scaling",
       {{"rope_type", "llama3"}},
       kInvalid,
       "rope_scaling.factor: is missing; must be a number from 1 to 1e+06"},
      {"rope_parameters",
       {{"full_attention", {{"rope_theta", 1.0}}}},
       kUnimplemented,
       "rope_parameters.\"full_attention\": RoPE that differs between layers is not supported"},
      {"rope_parameters",
       {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}},
       kUnimplemented,
       "rope_parameters.partial_rotary_factor: is 0.5; only 1 is supported"},
      {"rope_scaling",
       {{"factor", 4.0}},
       kUnimplemented,
       "rope_scaling.factor: is 4.0; only 1 is supported"},
      {"rope_scaling",
       {{"type", "default"}, {"mrope_section", {16, 24, 24}}},
       kUnimplemented,
       "rope_scaling.\"mrope_section\": is not known with rope_type \"default\""},
      {"tie_word_embeddings", "yes", kInvalid,
       "tie_word_embeddings: is a string; must be true or false"},
      {"hidden_act", "gelu", kUnimplemented,
       "hidden_act: \"gelu\" is not supported; must be \"silu\""},
      {"hidden_act", 7, kInvalid, "hidden_act: is a number; must be a string"},
      {"torch_dtype", "float8", kUnimplemented,
       "torch_dtype: \"float8\" is not supported; supported are \"float32\", \"bfloat16\" and "
       "\"float16\""},
      {"quantization_config",
       {{"quant_method", "gptq"}, {"bits", 4}},
       kUnimplemented,
       "quantization_config: quant_method \"gptq\" is not supported; use a checkpoint of float32, "
       "bfloat16 or float16 "
       "weights"},
      {"eos_token_id",
       {1, "2"},
       kInvalid,
       "eos_token_id: is a string; must be an integer from 0 to 2147483647 or a list of them"},
      {"bos_token_id", -7, kInvalid,
       "bos_token_id: is -7; must be an integer from 0 to 2147483647 or a list of them"},
      {"architectures", removed, kInvalid,
       "architectures: must be a list of one string, such as [\"LlamaForCausalLM\"]"},
      {"architectures",
       {"A\nB"},
       kUnimplemented,
       "architectures: \"A\\x0aB\" is not supported; supported are LlamaForCausalLM, "
       "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and Starcoder2ForCausalLM"},
  };
  for (const Refusal& refusal : refusals) {
    Json json = Golden("tiny-llama3");
    if (refusal.value.is_discarded()) {
      json.erase(refusal.field);
    } else {
      json[refusal.field] = refusal.value;
    }
    ExpectError(Parse(json).status(), refusal.code, std::string("config.json: ") + refusal.line);
  }
}

// A top-level partial_rotary_factor was read nowhere, and the model talked nonsense.
TEST(ConfigTest, FieldsOfOtherMathsAreRefused) {
  struct Field {
    const char* model;
    const char* name;
    Json value;
    const char* what;
  };
  const std::vector<Field> fields = {
      {"tiny-llama3", "partial_rotary_factor", 0.5, "is 0.5; only 1 is supported"},
      {"tiny-qwen3", "rotary_pct", 0.25, "is 0.25; only 1 is supported"},
      {"tiny-llama3", "rope_interleaved", true,
       "is true; only false is supported for a LlamaForCausalLM"},
      {"tiny-llama3", "no_rope_layers", {1, 0}, "layers without RoPE are not supported"},
      {"tiny-llama3", "logits_scaling", 8, "is 8; only 1 is supported"},
      {"tiny-llama3", "attention_multiplier", 0.5, "is 0.5; only 0.25 is supported"},
      {"tiny-llama3", "query_pre_attn_scalar", 256, "is 256; only 16 is supported"},
      {"tiny-llama3", "residual_multiplier", 0.22, "is 0.22; only 1 is supported"},
      {"tiny-llama3", "scale_emb", "12", "is a string; only 1 is supported"},
      {"tiny-llama3", "clip_qkv", 8.0, "is 8.0; only null is supported"},
      {"tiny-llama3", "final_logit_softcapping", 30.0, "is 30.0; only null is supported"},
      {"tiny-qwen2",
       "dual_chunk_attention_config",
       {{"chunk_size", 262144}},
       "is an object; only null is supported"},
      {"tiny-qwen3", "num_experts", 128, "is more than 1; mixtures of experts are not supported"},
      {"tiny-llama3", "bias", true, "is true; only false is supported for a LlamaForCausalLM"},
      {"tiny-mistral-swa", "attention_bias", true,
       "is true; only false is supported for a MistralForCausalLM"},
      {"tiny-qwen2", "mlp_bias", true, "is true; only false is supported for a Qwen2ForCausalLM"},
      {"tiny-qwen2", "qkv_bias", false, "is false; only true is supported for a Qwen2ForCausalLM"},
      {"tiny-qwen3", "use_qk_norm", false,
       "is false; only true is supported for a Qwen3ForCausalLM"},
      {"tiny-qwen3", "headwise_attn_output_gate", true,
       "is true; only false is supported for a Qwen3ForCausalLM"},
      {"tiny-qwen2", "is_causal", false, "is false; only true is supported for a Qwen2ForCausalLM"},
      {"tiny-llama3", "sliding_window", 64,
       "is 64; a LlamaForCausalLM has none: remove it when the model was trained without one"},
      {"tiny-mistral-swa", "max_window_layers", 2, "is 2; only 0 is supported"},
      {"tiny-mistral-swa",
       "layer_types",
       {"full_attention", "sliding_attention", "full_attention", "sliding_attention"},
       "differs from what num_hidden_layers, use_sliding_window, sliding_window and "
       "max_window_layers say; only those patterns are supported"},
      {"tiny-llama3",
       "layer_types",
       {"full_attention", "sliding_attention"},
       "differs from what num_hidden_layers, use_sliding_window, sliding_window and "
       "max_window_layers say; only those patterns are supported"},
      {"tiny-starcoder2", "hidden_act", "gelu",
       "\"gelu\" is not supported; must be \"gelu_pytorch_tanh\""},
      {"tiny-starcoder2", "norm_type", "rms_norm",
       "\"rms_norm\" is not supported; must be \"layer_norm\""},
      {"tiny-starcoder2", "mlp_type", "gated", "\"gated\" is not supported; must be \"default\""},
      {"tiny-starcoder2", "mlp_bias", false,
       "is false; only true is supported for a Starcoder2ForCausalLM"},
      {"tiny-llama3",
       "compression_config",
       {{"format", "pack-quantized"}},
       "this is not supported; use a checkpoint of float32, bfloat16 or float16 weights"},
      {"tiny-llama3",
       "quantization",
       {{"group_size", 64}, {"bits", 4}},
       "this is not supported; use a checkpoint of float32, bfloat16 or float16 weights"},
  };
  for (const Field& field : fields) {
    Json json = Golden(field.model);
    json[field.name] = field.value;
    ExpectError(Parse(json).status(), absl::StatusCode::kUnimplemented,
                absl::StrCat("config.json: ", field.name, ": ", field.what));
  }
}

TEST(ConfigTest, FieldsThatSayWhatIsDoneAnywayAreFine) {
  const std::vector<std::pair<const char*, Json>> cases = {
      {"tiny-llama3",
       {{"partial_rotary_factor", 1.0},
        {"query_pre_attn_scalar", 16},
        {"attention_multiplier", 0.25},
        {"clip_qkv", nullptr},
        {"num_experts", 0},
        {"no_rope_layers", {1, 1}},
        {"bias", false},
        {"use_sliding_window", false},
        {"sliding_window", 64},
        {"layer_types", {"full_attention", "full_attention"}},
        {"rope_interleaved", false},
        {"pretraining_tp", 1}}},
      {"tiny-qwen2",
       {{"qkv_bias", true}, {"attention_bias", true}, {"is_causal", true}, {"use_mrope", false}}},
      {"tiny-qwen3", {{"use_qk_norm", true}, {"qk_norm", true}}},
      {"tiny-mistral-swa", {{"use_sliding_window", true}, {"max_window_layers", 0}}},
  };
  for (const auto& [model, fields] : cases) {
    Json json = Golden(model);
    for (const auto& [key, value] : fields.items()) json[key] = value;
    const auto config = Parse(json);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->SlidingWindow(0), Parse(Golden(model))->SlidingWindow(0));
  }
}

TEST(ConfigTest, WindowThatIsSwitchedOffOrMissing) {
  Json json = Golden("tiny-mistral-swa");
  json["use_sliding_window"] = false;
  EXPECT_EQ(Parse(json)->SlidingWindow(0), 0);
  json = Golden("tiny-qwen2");
  json["use_sliding_window"] = true;
  json.erase("sliding_window");
  ExpectError(Parse(json).status(), absl::StatusCode::kInvalidArgument,
              "config.json: use_sliding_window: is true and sliding_window is missing or null");
}

TEST(ConfigTest, TwoRopeObjectsMustAgree) {
  Json json = Golden("tiny-llama3");
  json["rope_parameters"] = json["rope_scaling"];
  EXPECT_TRUE(Parse(json).ok());
  json["rope_parameters"]["factor"] = 32.0;
  ExpectError(Parse(json).status(), absl::StatusCode::kInvalidArgument,
              "config.json: rope_scaling: differs from rope_parameters; give one of the two");
}

TEST(ConfigTest, HeadDimThatCannotBeInferred) {
  Json json = Golden("tiny-mistral-swa");
  json["hidden_size"] = 100;
  ExpectError(Parse(json).status(), absl::StatusCode::kInvalidArgument,
              "config.json: head_dim: is missing, and num_attention_heads 8 does not divide "
              "hidden_size 100 into 2 to "
              "4096; give head_dim");
}

TEST(ConfigTest, OtherArchitecturesAreRefusedByName) {
  for (const auto& [model, architecture] :
       {std::pair("tiny-qwen3-moe", "Qwen3MoeForCausalLM"), std::pair("tiny-bert", "BertModel")}) {
    ExpectError(LoadModelConfig(GoldenDir(model)).status(), absl::StatusCode::kUnimplemented,
                GoldenDir(model) + "/config.json: architectures: \"" + architecture +
                    "\" is not supported; supported are LlamaForCausalLM, MistralForCausalLM, "
                    "Qwen2ForCausalLM, Qwen3ForCausalLM and Starcoder2ForCausalLM");
  }
}

TEST(ConfigTest, WhatIsNotAJsonObject) {
  const auto error = [](const std::string& text) {
    return std::string(ParseModelConfig(text, "c").status().message());
  };
  EXPECT_EQ(error(""), "c: is not valid JSON (at byte 1 of 0)");
  EXPECT_EQ(error("{\"a\": 1,}"), "c: is not valid JSON (at byte 9 of 9)");
  EXPECT_EQ(error("{\"a\": \"\xff\"}"), "c: is not valid JSON (at byte 8 of 10)");
  EXPECT_EQ(error("{\"a\": 1e999}"), "c: is not valid JSON (a number is out of range)");
  EXPECT_EQ(error("[1]"), "c: is an array; must be an object");
  EXPECT_EQ(error("{\"vocab_size\": 1, \"vocab_size\": 2}"),
            "c: has the key \"vocab_size\" twice in one object");
  EXPECT_EQ(error("{\"a\": " + std::string(100000, '[') + std::string(100000, ']') + "}"),
            "c: is nested deeper than 64 levels");
  EXPECT_EQ(error("{\"a\": " + std::string(100000, '[')),
            "c: is not valid JSON (at byte 100007 of 100006)");
}

TEST(ConfigTest, MissingDirectoryAndWrongKindOfFile) {
  TempDir dir;
  ExpectError(LoadModelConfig(dir / "none").status(), absl::StatusCode::kNotFound,
              (dir / "none") +
                  "/config.json: not found; a model is the directory of a Hugging Face checkpoint");
  std::filesystem::create_directories((dir / "m") + "/config.json");
  ExpectError(LoadModelConfig(dir / "m").status(), absl::StatusCode::kInvalidArgument,
              (dir / "m") + "/config.json: is not a regular file");
}

}  // namespace
}  // namespace trireme
