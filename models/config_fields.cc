#include "models/config_fields.h"

#include <cmath>
#include <set>

namespace trireme {
namespace {

using Json = nlohmann::json;

std::string Shown(const Json& value) {
  return value.is_number() || value.is_boolean() ? value.dump() : TypeOf(value);
}

// A field that makes the architecture another one when it is not `has`.
void CheckFlag(FieldReader& in, const ModelConfig& config, const std::string& field, bool has) {
  if (in.Bool(field, has) == has) return;
  in.Unimplemented(field,
                   absl::StrCat("is ", has ? "false" : "true", "; only ", has ? "true" : "false",
                                " is supported for a ", config.architecture));
}

void CheckNumbers(FieldReader& in, const ModelConfig& config) {
  const auto head_dim = static_cast<double>(config.head_dim);
  const struct {
    const char* field;
    std::optional<double> neutral;
  } numbers[] = {
      // RoPE over a part of the head (GPT-NeoX, Phi, StableLM, Nemotron) or of another base (Gemma
      // 3), and layers without it (SmolLM3, Llama 4).
      {"partial_rotary_factor", 1.0},
      {"rotary_pct", 1.0},
      {"rotary_percent", 1.0},
      {"rotary_dim", head_dim},
      {"rope_local_base_freq", config.rope_theta},
      {"no_rope_layer_interval", 0.0},
      // Scales and limits of logits, scores, embeddings and residuals (Granite, Cohere, MiniCPM,
      // Gemma, OLMo, Grok).
      {"logit_scale", 1.0},
      {"logits_scaling", 1.0},
      {"attention_multiplier", 1.0 / std::sqrt(head_dim)},
      {"query_pre_attn_scalar", head_dim},
      {"residual_multiplier", 1.0},
      {"embedding_multiplier", 1.0},
      {"scale_emb", 1.0},
      {"scale_depth", std::sqrt(static_cast<double>(config.num_layers))},
      {"dim_model_base", static_cast<double>(config.hidden_size)},
      {"clip_qkv", std::nullopt},
      {"attn_logit_softcapping", std::nullopt},
      {"final_logit_softcapping", std::nullopt},
      // Attention over less than sliding_window and layer_types say (Llama 4, Gemma 3, Qwen2.5-1M).
      {"attention_chunk_size", std::nullopt},
      {"sliding_window_pattern", std::nullopt},
      {"interleaved_sliding_window", std::nullopt},
      {"dual_chunk_attention_config", std::nullopt},
  };
  for (const auto& [field, neutral] : numbers) CheckNeutral(in, field, neutral);
}

void CheckFlags(FieldReader& in, const ModelConfig& config) {
  CheckFlag(in, config, "rope_interleaved", false);
  CheckFlag(in, config, "rope_interleave", false);
  CheckFlag(in, config, "use_mrope", false);
  // Biases that other runtimes know by these names. Qwen2 has those of q, k and v whatever
  // attention_bias says, as in transformers.
  if (config.architecture == "MistralForCausalLM") CheckFlag(in, config, "attention_bias", false);
  const bool starcoder2 = config.architecture == "Starcoder2ForCausalLM";
  if (starcoder2) CheckFlag(in, config, "attention_bias", config.qkv_bias);
  CheckFlag(in, config, "mlp_bias", config.mlp_bias);
  CheckFlag(in, config, "qkv_bias", config.qkv_bias);
  CheckFlag(in, config, "bias", false);
  CheckFlag(in, config, "use_bias", starcoder2 && config.mlp_bias);
  CheckFlag(in, config, "lm_head_bias", false);
  // Norms of queries and keys, gates of the heads' outputs, another order of layers, and attention
  // to what comes later (embedding models made from decoders).
  CheckFlag(in, config, "use_qk_norm", config.qk_norm);
  CheckFlag(in, config, "qk_norm", config.qk_norm);
  CheckFlag(in, config, "qk_layernorm", config.qk_norm);
  CheckFlag(in, config, "elementwise_attn_output_gate", false);
  CheckFlag(in, config, "headwise_attn_output_gate", false);
  CheckFlag(in, config, "attn_temperature_tuning", false);
  CheckFlag(in, config, "use_parallel_residual", false);
  CheckFlag(in, config, "alibi", false);
  CheckFlag(in, config, "is_causal", true);
}

}  // namespace

void CheckNeutral(FieldReader& in, const std::string& field, std::optional<double> neutral) {
  const Json* value = in.Find(field);
  if (value == nullptr || *value == false) return;
  if (neutral && value->is_number() &&
      std::abs(value->get<double>() - *neutral) <= 1e-6 * std::abs(*neutral))
    return;
  in.Unimplemented(
      field, absl::StrCat("is ", Shown(*value), "; only ",
                          neutral ? absl::StrCat(*neutral) : std::string("null"), " is supported"));
}

void CheckRopeFields(FieldReader& rope, const Json& object, const std::string& type) {
  if (!rope.status().ok()) return;
  std::set<std::string> known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"};
  if (type == "llama3") {
    known.insert(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"});
  } else {
    CheckNeutral(rope, "factor", 1.0);
    known.insert("factor");
  }
  for (const auto& [key, value] : object.items()) {
    if (!known.contains(key) && !value.is_null())
      rope.Unimplemented(Quoted(key), absl::StrCat("is not known with rope_type ", Quoted(type)));
  }
}

void CheckQuantization(FieldReader& in) {
  // transformers; its name before; MLX.
  for (const char* field : {"quantization_config", "compression_config", "quantization"}) {
    const Json* quantization = in.Find(field);
    if (quantization == nullptr) continue;
    const auto method =
        quantization->is_object() ? quantization->find("quant_method") : quantization->end();
    in.Unimplemented(
        field, absl::StrCat(
                   quantization->is_object() && method != quantization->end() && method->is_string()
                       ? "quant_method " + Quoted(method->get<std::string>())
                       : std::string("this"),
                   " is not supported; use a checkpoint of float32, bfloat16 or float16 "
                   "weights"));
  }
}

void CheckOtherMaths(FieldReader& in, const ModelConfig& config) {
  CheckNumbers(in, config);
  CheckFlags(in, config);
  for (const char* field : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    constexpr int64_t kMost = 1 << 20;
    if (in.Int(field, 0, kMost, 0) > 1)
      in.Unimplemented(field, "is more than 1; mixtures of experts are not supported");
  }
  for (const int64_t has_rope : in.Ints("no_rope_layers", 0, 1)) {
    if (has_rope == 0) in.Unimplemented("no_rope_layers", "layers without RoPE are not supported");
  }
}

}  // namespace trireme
