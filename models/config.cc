#include "models/config.h"

#include <cmath>
#include <limits>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/config_fields.h"
#include "models/json_file.h"

namespace trireme {
namespace {

using Json = nlohmann::json;

// Bounds of the sizes. Their products stay below 2^62, so that parameter and byte counts cannot
// overflow: a layer has less than 2^47 parameters, 2^12 layers of 4 bytes each make 2^61.
constexpr int64_t kMaxHidden = 1 << 20;
constexpr int64_t kMaxIntermediate = 1 << 22;
constexpr int64_t kMaxLayers = 1 << 12;
constexpr int64_t kMaxHeads = 1 << 12;
constexpr int64_t kMaxHeadDim = 1 << 12;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxPositions = 1 << 30;
constexpr int64_t kMaxTokenId = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxConfigBytes = 16 << 20;

constexpr const char* kSupported =
    "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and "
    "Starcoder2ForCausalLM";
constexpr const char* kStarcoder2 = "Starcoder2ForCausalLM";

std::string ReadArchitecture(FieldReader& in) {
  const Json* list = in.Find("architectures");
  if (list == nullptr || !list->is_array() || list->size() != 1 || !list->front().is_string()) {
    in.Invalid("architectures", "must be a list of one string, such as [\"LlamaForCausalLM\"]");
    return "";
  }
  const std::string name = list->front().get<std::string>();
  if (name != "LlamaForCausalLM" && name != "MistralForCausalLM" && name != "Qwen2ForCausalLM" &&
      name != "Qwen3ForCausalLM" && name != kStarcoder2) {
    in.Unimplemented("architectures",
                     absl::StrCat(Quoted(name), " is not supported; supported are ", kSupported));
  }
  return name;
}

void ReadSizes(FieldReader& in, ModelConfig& config) {
  config.hidden_size = in.Int("hidden_size", 1, kMaxHidden);
  config.intermediate_size = in.Int("intermediate_size", 1, kMaxIntermediate);
  config.num_layers = in.Int("num_hidden_layers", 1, kMaxLayers);
  config.num_heads = in.Int("num_attention_heads", 1, kMaxHeads);
  config.num_kv_heads = in.Int("num_key_value_heads", 1, kMaxHeads, config.num_heads);
  config.vocab_size = in.Int("vocab_size", 1, kMaxVocab);
  config.max_positions = in.Int("max_position_embeddings", 1, kMaxPositions);
  config.head_dim = in.Int("head_dim", 2, kMaxHeadDim, 0);
  config.norm_eps = config.architecture == kStarcoder2 ? in.Real("norm_epsilon", 1e-12, 1.0, 1e-5)
                                                       : in.Real("rms_norm_eps", 1e-12, 1.0, 1e-6);
  if (!in.status().ok()) return;
  if (config.num_heads % config.num_kv_heads != 0) {
    in.Invalid("num_key_value_heads",
               absl::StrCat("is ", config.num_kv_heads, "; must divide num_attention_heads, ",
                            config.num_heads));
  }
  if (config.head_dim == 0) {
    config.head_dim = config.hidden_size / config.num_heads;
    if (config.hidden_size % config.num_heads != 0 || config.head_dim > kMaxHeadDim) {
      in.Invalid("head_dim", absl::StrCat("is missing, and num_attention_heads ", config.num_heads,
                                          " does not divide hidden_size ", config.hidden_size,
                                          " into 2 to ", kMaxHeadDim, "; give head_dim"));
    }
  }
  if (config.head_dim < 2 || config.head_dim % 2 != 0) {
    in.Invalid("head_dim", absl::StrCat("is ", config.head_dim, "; must be even (rotary pairs)"));
  }
}

// transformers 4 writes rope_theta and rope_scaling, transformers 5 one object rope_parameters.
void ReadRope(FieldReader& in, const std::string& file, ModelConfig& config) {
  constexpr double kMaxTheta = 1e15;
  config.rope_theta = in.Real("rope_theta", 1.0, kMaxTheta, 10000.0);
  const Json* const parameters = in.Find("rope_parameters");
  const Json* const scaling = in.Find("rope_scaling");
  const std::string field = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const Json* object = in.Find(field);
  if (object == nullptr) return;
  if (!object->is_object()) {
    in.Invalid(field, absl::StrCat("is ", TypeOf(*object), "; must be an object or null"));
    return;
  }
  FieldReader rope(*object, file, field + ".");
  config.rope_theta = rope.Real("rope_theta", 1.0, kMaxTheta, config.rope_theta);
  const std::string type = rope.String("rope_type", rope.String("type", "default"));
  if (rope.status().ok() && type != "default" && type != "llama3") {
    rope.Unimplemented(
        "rope_type",
        absl::StrCat(Quoted(type), " is not supported; supported are \"default\" and \"llama3\""));
  }
  for (const auto& [key, value] : object->items()) {
    if (value.is_object())
      rope.Unimplemented(Quoted(key), "RoPE that differs between layers is not supported");
  }
  CheckNeutral(rope, "partial_rotary_factor", 1.0);
  CheckRopeFields(rope, *object, type);
  if (type == "llama3") {
    config.rope_scaling.factor = rope.Real("factor", 1.0, 1e6);
    config.rope_scaling.low_freq_factor = rope.Real("low_freq_factor", 1e-6, 1e6);
    config.rope_scaling.high_freq_factor = rope.Real("high_freq_factor", 1e-6, 1e6);
    config.rope_scaling.original_max_position_embeddings =
        rope.Int("original_max_position_embeddings", 1, kMaxPositions);
    if (config.rope_scaling.high_freq_factor <= config.rope_scaling.low_freq_factor) {
      rope.Invalid("high_freq_factor", absl::StrCat("is ", config.rope_scaling.high_freq_factor,
                                                    "; must be more than low_freq_factor, ",
                                                    config.rope_scaling.low_freq_factor));
    }
  }
  in.Update(rope.status());
  if (parameters != nullptr && scaling != nullptr && *parameters != *scaling)
    in.Invalid("rope_scaling", "differs from rope_parameters; give one of the two");
}

// Mistral and StarCoder2: a window on every layer. Qwen: on the layers from max_window_layers on,
// and only with use_sliding_window. Newer files repeat the outcome as layer_types, which must then
// agree.
void ReadSlidingWindow(FieldReader& in, ModelConfig& config) {
  const int64_t window = in.Int("sliding_window", 1, kMaxPositions, 0);
  const bool qwen = config.architecture.starts_with("Qwen");
  const bool used = in.Bool("use_sliding_window", !qwen);
  constexpr int64_t kMaxWindowLayersOfTransformers = 28;
  const int64_t from_layer =
      in.Int("max_window_layers", 0, kMaxLayers, qwen ? kMaxWindowLayersOfTransformers : 0);
  if (config.architecture == "LlamaForCausalLM") {
    if (used && window > 0 && window < config.max_positions) {
      in.Unimplemented("sliding_window",
                       absl::StrCat("is ", window,
                                    "; a LlamaForCausalLM has none: remove it when "
                                    "the model was trained without one"));
    }
  } else if (used && window > 0) {
    if (!qwen) CheckNeutral(in, "max_window_layers", 0.0);
    config.sliding_window = window;
    config.sliding_window_from_layer = from_layer;
  } else if (used && qwen) {
    in.Invalid("use_sliding_window", "is true and sliding_window is missing or null");
  }
  const Json* types = in.Find("layer_types");
  if (types == nullptr || !in.status().ok()) return;
  bool agrees = types->is_array() && static_cast<int64_t>(types->size()) == config.num_layers;
  for (int64_t layer = 0; agrees && layer < config.num_layers; ++layer) {
    agrees = (*types)[layer] ==
             (config.SlidingWindow(layer) > 0 ? "sliding_attention" : "full_attention");
  }
  if (!agrees) {
    in.Unimplemented("layer_types",
                     "differs from what num_hidden_layers, use_sliding_window, sliding_window and "
                     "max_window_layers say; only those patterns are supported");
  }
}

// `what` the field must be, which is also what its absence means.
void CheckName(FieldReader& in, const std::string& field, const std::string& what) {
  const std::string name = in.String(field, what);
  if (name == what) return;
  in.Unimplemented(field, absl::StrCat(Quoted(name), " is not supported; must be ", Quoted(what)));
}

// LayerNorm, biases on all linear layers or none, and an MLP without a gate.
void ReadStarcoder2(FieldReader& in, ModelConfig& config) {
  config.norm = NormKind::kLayer;
  config.mlp = MlpKind::kGelu;
  config.qkv_bias = config.output_bias = config.mlp_bias = in.Bool("use_bias", true);
  config.tied_head = in.Bool("tie_word_embeddings", true);
  CheckName(in, "hidden_act", "gelu_pytorch_tanh");
  CheckName(in, "norm_type", "layer_norm");
  CheckName(in, "mlp_type", "default");
}

void ReadVariant(FieldReader& in, ModelConfig& config) {
  if (config.architecture == kStarcoder2) return ReadStarcoder2(in, config);
  const bool attention_bias = in.Bool("attention_bias", false);
  if (config.architecture == "LlamaForCausalLM" || config.architecture == "Qwen3ForCausalLM") {
    config.qkv_bias = attention_bias;
    config.output_bias = attention_bias;
  }
  if (config.architecture == "Qwen2ForCausalLM") config.qkv_bias = true;
  if (config.architecture == "LlamaForCausalLM") config.mlp_bias = in.Bool("mlp_bias", false);
  config.qk_norm = config.architecture == "Qwen3ForCausalLM";
  config.tied_head = in.Bool("tie_word_embeddings", false);
  if (in.String("hidden_act", "silu") != "swish") CheckName(in, "hidden_act", "silu");
}

void ReadDType(FieldReader& in, ModelConfig& config) {
  const std::string field = in.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  std::string type = in.String(field, "float32");
  if (type.starts_with("torch.")) type = type.substr(6);
  if (type == "float32") {
    config.dtype = DType::kF32;
  } else if (type == "bfloat16") {
    config.dtype = DType::kBF16;
  } else if (type == "float16") {
    config.dtype = DType::kF16;
  } else {
    in.Unimplemented(field,
                     absl::StrCat(Quoted(type),
                                  " is not supported; supported are \"float32\", \"bfloat16\" "
                                  "and \"float16\""));
  }
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& json, const std::string& name) {
  ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, name));
  FieldReader in(object, name);
  ModelConfig config;
  config.architecture = ReadArchitecture(in);
  RETURN_IF_ERROR(in.status());
  ReadSizes(in, config);
  ReadRope(in, name, config);
  ReadSlidingWindow(in, config);
  ReadVariant(in, config);
  ReadDType(in, config);
  CheckQuantization(in);
  if (in.status().ok()) CheckOtherMaths(in, config);
  const std::vector<int64_t> bos = in.Ints("bos_token_id", 0, kMaxTokenId);
  config.bos_token_id = bos.empty() ? -1 : bos.front();
  config.eos_token_ids = in.Ints("eos_token_id", 0, kMaxTokenId);
  RETURN_IF_ERROR(in.status());
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  auto text = ReadTextFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        absl::StrCat(path, ": not found; a model is the directory of a Hugging Face checkpoint"));
  }
  RETURN_IF_ERROR(text.status());
  ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(*text, path));
  const std::string generation_path = model_dir + "/generation_config.json";
  const auto generation_text = ReadTextFile(generation_path, kMaxConfigBytes);
  if (absl::IsNotFound(generation_text.status())) return config;
  RETURN_IF_ERROR(generation_text.status());
  ASSIGN_OR_RETURN(const Json generation, ParseJsonObject(*generation_text, generation_path));
  FieldReader in(generation, generation_path);
  std::vector<int64_t> eos = in.Ints("eos_token_id", 0, kMaxTokenId);
  RETURN_IF_ERROR(in.status());
  if (!eos.empty()) config.eos_token_ids = std::move(eos);
  return config;
}

std::vector<double> RopeFrequencies(const ModelConfig& config) {
  std::vector<double> out;
  const RopeScaling& scaling = config.rope_scaling;
  for (int64_t i = 0; i < config.head_dim; i += 2) {
    const double frequency =
        1.0 /
        std::pow(config.rope_theta, static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (scaling.original_max_position_embeddings == 0) {
      out.push_back(frequency);
      continue;
    }
    const double wavelength = 2.0 * std::numbers::pi / frequency;
    const double length = static_cast<double>(scaling.original_max_position_embeddings);
    if (wavelength < length / scaling.high_freq_factor) {
      out.push_back(frequency);
    } else if (wavelength > length / scaling.low_freq_factor) {
      out.push_back(frequency / scaling.factor);
    } else {
      const double smooth = (length / wavelength - scaling.low_freq_factor) /
                            (scaling.high_freq_factor - scaling.low_freq_factor);
      out.push_back((1.0 - smooth) * frequency / scaling.factor + smooth * frequency);
    }
  }
  return out;
}

}  // namespace trireme
