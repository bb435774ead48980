#include "absl/strings/str_cat.h"
#include "models/weights.h"

namespace trireme {
namespace {

// Cut along the heads: rows of q, columns of o.
WeightSpec Heads(const std::string& name, Shape shape, Split split, int64_t head_dim,
                 const std::string& fields) {
  return {name, shape, split, head_dim, false, fields};
}
// Cut along the KV heads, of which there may be fewer than ranks.
WeightSpec KvHeads(const std::string& name, Shape shape, int64_t head_dim,
                   const std::string& fields) {
  return {name, shape, Split::kRows, head_dim, true, fields};
}
WeightSpec Whole(const std::string& name, Shape shape, const std::string& fields) {
  return {name, shape, Split::kNone, 1, false, fields};
}
WeightSpec Once(const std::string& name, Shape shape, const std::string& fields) {
  return {name, shape, Split::kOnce, 1, false, fields};
}
WeightSpec Cut(const std::string& name, Shape shape, Split split, const std::string& fields) {
  return {name, shape, split, 1, false, fields};
}

LayerWeightSpecs LayerSpecs(const ModelConfig& c, int64_t layer) {
  const std::string p = absl::StrCat("model.layers.", layer, ".");
  const std::string a = p + "self_attn.", m = p + "mlp.";
  const int64_t h = c.hidden_size, d = c.head_dim, f = c.intermediate_size;
  const int64_t q_rows = c.num_heads * d, kv_rows = c.num_kv_heads * d;
  const std::string q_fields = "num_attention_heads * head_dim",
                    kv_fields = "num_key_value_heads * head_dim";
  const bool gated = c.mlp == MlpKind::kSwiGlu;
  const std::string up = m + (gated ? "up_proj" : "c_fc"),
                    down = m + (gated ? "down_proj" : "c_proj");
  LayerWeightSpecs out;
  out.input_norm = Whole(p + "input_layernorm.weight", {h}, "hidden_size");
  out.q = Heads(a + "q_proj.weight", {q_rows, h}, Split::kRows, d, q_fields + ", hidden_size");
  out.k = KvHeads(a + "k_proj.weight", {kv_rows, h}, d, kv_fields + ", hidden_size");
  out.v = KvHeads(a + "v_proj.weight", {kv_rows, h}, d, kv_fields + ", hidden_size");
  out.o = Heads(a + "o_proj.weight", {h, q_rows}, Split::kCols, d, "hidden_size, " + q_fields);
  out.post_norm = Whole(p + "post_attention_layernorm.weight", {h}, "hidden_size");
  if (gated)
    out.gate = Cut(m + "gate_proj.weight", {f, h}, Split::kRows, "intermediate_size, hidden_size");
  out.up = Cut(up + ".weight", {f, h}, Split::kRows, "intermediate_size, hidden_size");
  out.down = Cut(down + ".weight", {h, f}, Split::kCols, "hidden_size, intermediate_size");
  if (c.norm == NormKind::kLayer) {
    out.input_norm_bias = Whole(p + "input_layernorm.bias", {h}, "hidden_size");
    out.post_norm_bias = Whole(p + "post_attention_layernorm.bias", {h}, "hidden_size");
  }
  if (c.qkv_bias) {
    out.q_bias = Heads(a + "q_proj.bias", {q_rows}, Split::kRows, d, q_fields);
    out.k_bias = KvHeads(a + "k_proj.bias", {kv_rows}, d, kv_fields);
    out.v_bias = KvHeads(a + "v_proj.bias", {kv_rows}, d, kv_fields);
  }
  // Row-parallel layers' biases are not cut.
  if (c.output_bias) out.o_bias = Once(a + "o_proj.bias", {h}, "hidden_size");
  if (c.qk_norm) {
    out.q_norm = Whole(a + "q_norm.weight", {d}, "head_dim");
    out.k_norm = Whole(a + "k_norm.weight", {d}, "head_dim");
  }
  if (c.mlp_bias) {
    if (gated) out.gate_bias = Cut(m + "gate_proj.bias", {f}, Split::kRows, "intermediate_size");
    out.up_bias = Cut(up + ".bias", {f}, Split::kRows, "intermediate_size");
    out.down_bias = Once(down + ".bias", {h}, "hidden_size");
  }
  return out;
}

// Those that have a name.
std::vector<WeightSpec> Present(std::initializer_list<const WeightSpec*> specs) {
  std::vector<WeightSpec> out;
  for (const WeightSpec* spec : specs) {
    if (!spec->name.empty()) out.push_back(*spec);
  }
  return out;
}

}  // namespace

DecoderWeightSpecs WeightSpecsOf(const ModelConfig& config) {
  const Shape vocabulary{config.vocab_size, config.hidden_size};
  DecoderWeightSpecs out;
  out.embedding =
      Cut("model.embed_tokens.weight", vocabulary, Split::kRows, "vocab_size, hidden_size");
  for (int64_t layer = 0; layer < config.num_layers; ++layer)
    out.layers.push_back(LayerSpecs(config, layer));
  out.final_norm = Whole("model.norm.weight", {config.hidden_size}, "hidden_size");
  if (config.norm == NormKind::kLayer)
    out.final_norm_bias = Whole("model.norm.bias", {config.hidden_size}, "hidden_size");
  out.head = config.tied_head
                 ? out.embedding
                 : Cut("lm_head.weight", vocabulary, Split::kRows, "vocab_size, hidden_size");
  return out;
}

std::vector<const WeightSpec*> LinearSpecsOf(const LayerWeightSpecs& layer) {
  std::vector<const WeightSpec*> out = {&layer.q, &layer.k, &layer.v, &layer.o};
  if (!layer.gate.name.empty()) out.push_back(&layer.gate);
  out.insert(out.end(), {&layer.up, &layer.down});
  return out;
}

std::vector<WeightSpec> SpecsOfLayer(const LayerWeightSpecs& layer) {
  return Present({&layer.input_norm, &layer.input_norm_bias, &layer.q,    &layer.q_bias,
                  &layer.k,          &layer.k_bias,          &layer.v,    &layer.v_bias,
                  &layer.q_norm,     &layer.k_norm,          &layer.o,    &layer.o_bias,
                  &layer.post_norm,  &layer.post_norm_bias,  &layer.gate, &layer.gate_bias,
                  &layer.up,         &layer.up_bias,         &layer.down, &layer.down_bias});
}

std::vector<WeightSpec> SpecsOfFinalNorm(const DecoderWeightSpecs& specs) {
  return Present({&specs.final_norm, &specs.final_norm_bias});
}

std::vector<WeightSpec> AllWeightSpecs(const ModelConfig& config) {
  const DecoderWeightSpecs specs = WeightSpecsOf(config);
  std::vector<WeightSpec> out = {specs.embedding};
  for (const LayerWeightSpecs& layer : specs.layers) {
    for (WeightSpec& spec : SpecsOfLayer(layer)) out.push_back(std::move(spec));
  }
  for (WeightSpec& spec : SpecsOfFinalNorm(specs)) out.push_back(std::move(spec));
  if (!config.tied_head) out.push_back(specs.head);
  return out;
}

Range PieceOfSpec(const WeightSpec& spec, int part, int parts) {
  CHECK(part >= 0 && part < parts) << spec.name << " part " << part << " of " << parts;
  if (spec.split == Split::kNone) return {0, spec.shape[0]};
  if (spec.split == Split::kOnce) return {0, part == 0 ? spec.shape[0] : 0};
  const int64_t n = spec.shape[spec.split == Split::kRows ? 0 : 1];
  const int64_t units = n / spec.unit;
  if (spec.replicate && units < parts) {
    CHECK_EQ(parts % units, 0) << spec.name;
    return PieceOf(n, static_cast<int>(units), static_cast<int>(part / (parts / units)), spec.unit);
  }
  return PieceOf(n, parts, part, spec.unit);
}

absl::Status CheckTensorParallel(const ModelConfig& config, const Topology& topology) {
  const int64_t tp = topology.tp_size;
  const auto why_not = [&config](int64_t parts) -> std::string {
    if (config.num_heads % parts != 0)
      return absl::StrCat("num_attention_heads ", config.num_heads);
    if (config.intermediate_size % parts != 0)
      return absl::StrCat("intermediate_size ", config.intermediate_size);
    if (config.num_kv_heads % parts != 0 && parts % config.num_kv_heads != 0) {
      return absl::StrCat("num_key_value_heads ", config.num_kv_heads, " (nor is it a multiple)");
    }
    return "";
  };
  if (tp < 1 || topology.pp_size < 1 || topology.dp_size < 1) {
    return absl::InvalidArgumentError(absl::StrCat("--tp ", tp, " --pp ", topology.pp_size,
                                                   " --dp ", topology.dp_size,
                                                   ": each must be at least 1"));
  }
  if (const std::string reason = why_not(tp); !reason.empty()) {
    std::string allowed;
    for (int64_t parts = 1; parts <= config.num_heads; ++parts) {
      if (why_not(parts).empty()) absl::StrAppend(&allowed, allowed.empty() ? "" : ", ", parts);
    }
    return absl::InvalidArgumentError(absl::StrCat("--tp ", tp, " does not divide the model's ",
                                                   reason, "; --tp can be ", allowed));
  }
  if (topology.pp_size > config.num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("--pp ", topology.pp_size,
                                                   " is more than the model's ", config.num_layers,
                                                   " layers; every stage needs one"));
  }
  return absl::OkStatus();
}

}  // namespace trireme
