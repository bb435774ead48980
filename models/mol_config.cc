#include "models/mol_config.h"

#include <cmath>
#include <initializer_list>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/json_file.h"

namespace trireme {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxConfigBytes = 1 << 20;
// No published head comes near these; they keep every product of sizes far from overflow.
constexpr int64_t kMaxSize = 1 << 16, kMaxComponents = 256, kMaxHash = int64_t{1} << 30;

// Fields of one object, each read once; what is left over is a misspelt name.
class Fields {
 public:
  Fields(const Json& object, const std::string& name) : object_(object), name_(name) {}

  absl::Status Size(const char* key, int64_t smallest, int64_t largest, int64_t* out) {
    const auto it = Find(key);
    if (it == object_.end()) {
      if (smallest == 0) return absl::OkStatus();
      return Invalid(key, "is missing");
    }
    const bool whole = it->is_number_integer();
    const int64_t value = whole ? it->get<int64_t>() : -1;
    // The reference writes -1 for "no such layer".
    if (whole && smallest == 0 && value == -1) return absl::OkStatus();
    if (!whole || value < smallest || value > largest) {
      return Invalid(key, absl::StrCat("is ", it->dump(), "; must be an integer from ", smallest,
                                       " to ", largest));
    }
    *out = value;
    return absl::OkStatus();
  }
  absl::Status Positive(const char* key, double* out) {
    const auto it = Find(key);
    if (it == object_.end()) return absl::OkStatus();
    // The maths is in f32, where 1e-40 is as good as nothing.
    constexpr double kLeast = 1e-30, kMost = 1e30;
    if (!it->is_number() || !(it->get<double>() >= kLeast && it->get<double>() <= kMost)) {
      return Invalid(key, absl::StrCat("is ", it->dump(), "; must be a number from 1e-30 to 1e30"));
    }
    *out = it->get<double>();
    return absl::OkStatus();
  }
  absl::Status Flag(const char* key, bool* out) {
    const auto it = Find(key);
    if (it == object_.end()) return absl::OkStatus();
    if (!it->is_boolean()) {
      return Invalid(key, absl::StrCat("is ", TypeOf(*it), "; must be true or false"));
    }
    *out = it->get<bool>();
    return absl::OkStatus();
  }
  // *second becomes true for the second word, false for the first.
  absl::Status Choice(const char* key, const char* first, const char* other, bool* second) {
    const auto it = Find(key);
    if (it == object_.end()) return absl::OkStatus();
    if (!it->is_string() || (*it != first && *it != other)) {
      return Invalid(key, absl::StrCat("is ", it->is_string() ? Quoted(*it) : TypeOf(*it),
                                       "; must be \"", first, "\" or \"", other, "\""));
    }
    *second = *it == other;
    return absl::OkStatus();
  }
  absl::Status Sizes(const char* key, int64_t largest, std::vector<int64_t>* out) {
    const auto it = Find(key);
    if (it == object_.end()) return absl::OkStatus();
    bool good = it->is_array();
    if (good) {
      for (const Json& item : *it) {
        good = good && item.is_number_integer() && item.get<int64_t>() >= 1 &&
               item.get<int64_t>() <= largest;
      }
    }
    if (!good) {
      return Invalid(key, absl::StrCat("must be a list of integers from 1 to ", largest));
    }
    *out = it->get<std::vector<int64_t>>();
    return absl::OkStatus();
  }
  absl::Status NothingElse() const {
    for (const auto& [key, value] : object_.items()) {
      if (seen_.count(key) == 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(name_, ": ", Quoted(key), " is no field of a mol config"));
      }
    }
    return absl::OkStatus();
  }
  absl::Status Invalid(const char* key, const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": ", key, ": ", what));
  }
  Json::const_iterator Find(const char* key) {
    seen_.insert(key);
    return object_.find(key);
  }

 private:
  const Json& object_;
  const std::string& name_;
  std::set<std::string> seen_;
};

absl::Status ReadSizes(Fields& fields, MolConfig* config) {
  RETURN_IF_ERROR(fields.Size("query_dim", 1, kMaxSize, &config->query_dim));
  RETURN_IF_ERROR(fields.Size("item_dim", 1, kMaxSize, &config->item_dim));
  RETURN_IF_ERROR(fields.Size("query_components", 1, kMaxComponents, &config->query_components));
  RETURN_IF_ERROR(fields.Size("item_components", 1, kMaxComponents, &config->item_components));
  RETURN_IF_ERROR(fields.Size("component_dim", 1, kMaxSize, &config->component_dim));
  RETURN_IF_ERROR(fields.Size("query_hidden", 0, kMaxSize, &config->query_hidden));
  RETURN_IF_ERROR(fields.Size("item_hidden", 0, kMaxSize, &config->item_hidden));
  return fields.Sizes("uid_hash_sizes", kMaxHash, &config->uid_hash_sizes);
}

absl::Status ReadVariants(Fields& fields, MolConfig* config) {
  bool diagonal = false, concat = false, query_geglu = true, item_geglu = true;
  RETURN_IF_ERROR(fields.Choice("query_nonlinearity", "swiglu", "geglu", &query_geglu));
  RETURN_IF_ERROR(fields.Choice("item_nonlinearity", "swiglu", "geglu", &item_geglu));
  RETURN_IF_ERROR(fields.Choice("pairing", "all", "diagonal", &diagonal));
  RETURN_IF_ERROR(fields.Choice("gating", "glu_silu", "concat_relu", &concat));
  RETURN_IF_ERROR(fields.Flag("l2_norm", &config->l2_norm));
  RETURN_IF_ERROR(fields.Positive("eps", &config->eps));
  RETURN_IF_ERROR(fields.Positive("temperature", &config->temperature));
  config->query_geglu = query_geglu;
  config->item_geglu = item_geglu;
  config->pairing = diagonal ? MolPairing::kDiagonal : MolPairing::kAll;
  config->gating = concat ? MolGating::kConcatRelu : MolGating::kGluSilu;
  if (concat) return fields.Size("gating_hidden", 1, kMaxSize, &config->gating_hidden);
  RETURN_IF_ERROR(fields.Size("gating_query_hidden", 1, kMaxSize, &config->gating_query_hidden));
  RETURN_IF_ERROR(fields.Size("gating_item_hidden", 1, kMaxSize, &config->gating_item_hidden));
  return fields.Size("gating_qi_hidden", 0, kMaxSize, &config->gating_qi_hidden);
}

absl::Status CheckTogether(const Fields& fields, const MolConfig& config) {
  if (config.projected_components() < 1) {
    return fields.Invalid(
        "uid_hash_sizes",
        absl::StrCat("has ", config.uid_hash_sizes.size(), " tables; at most ",
                     config.query_components - 1, " of the query_components can be user ids"));
  }
  if (config.pairing == MolPairing::kDiagonal &&
      config.query_components != config.item_components) {
    return fields.Invalid("pairing", absl::StrCat("\"diagonal\" needs as many query_components (",
                                                  config.query_components, ") as item_components (",
                                                  config.item_components, ")"));
  }
  if (config.gating == MolGating::kConcatRelu &&
      (config.query_hidden > 0 || config.item_hidden > 0 || !config.uid_hash_sizes.empty())) {
    return fields.Invalid("gating",
                          "\"concat_relu\" has linear projections only: no query_hidden, "
                          "item_hidden or uid_hash_sizes");
  }
  if (config.shape().logits() > 4096) {
    return fields.Invalid("query_components",
                          absl::StrCat("times item_components is ", config.shape().logits(),
                                       " logits a pair; at most 4096 are supported"));
  }
  return absl::OkStatus();
}

void AddProjection(const std::string& prefix, int64_t in, int64_t hidden, int64_t out,
                   std::vector<MolWeightSpec>* specs) {
  if (hidden > 0) {
    specs->push_back({prefix + ".1._w", {in, 2 * hidden}});
    specs->push_back({prefix + ".1._b", {1, 2 * hidden}});
  }
  const std::string last = prefix + (hidden > 0 ? ".2" : ".1");
  specs->push_back({last + ".weight", {out, hidden > 0 ? hidden : in}});
  specs->push_back({last + ".bias", {out}});
}

}  // namespace

MolShape MolConfig::shape() const {
  return {.query_components = query_components,
          .item_components = item_components,
          .component_dim = component_dim,
          .cross_hidden = gating == MolGating::kGluSilu ? gating_qi_hidden : gating_hidden,
          .pairing = pairing,
          .gating = gating,
          .temperature = static_cast<float>(temperature)};
}

absl::StatusOr<MolConfig> ParseMolConfig(const std::string& json, const std::string& name) {
  ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, name));
  Fields fields(object, name);
  const auto type = fields.Find("model_type");
  if (type == object.end() || *type != "mol") {
    return fields.Invalid("model_type", "must be \"mol\" for a Mixture-of-Logits head");
  }
  MolConfig config;
  RETURN_IF_ERROR(ReadSizes(fields, &config));
  RETURN_IF_ERROR(ReadVariants(fields, &config));
  RETURN_IF_ERROR(fields.NothingElse());
  RETURN_IF_ERROR(CheckTogether(fields, config));
  return config;
}

absl::StatusOr<MolConfig> LoadMolConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxConfigBytes));
  return ParseMolConfig(text, path);
}

std::string MolConfigJson(const MolConfig& config) {
  nlohmann::ordered_json out;
  out["model_type"] = "mol";
  out["query_dim"] = config.query_dim;
  out["item_dim"] = config.item_dim;
  out["query_components"] = config.query_components;
  out["item_components"] = config.item_components;
  out["component_dim"] = config.component_dim;
  out["query_hidden"] = config.query_hidden;
  out["item_hidden"] = config.item_hidden;
  out["query_nonlinearity"] = config.query_geglu ? "geglu" : "swiglu";
  out["item_nonlinearity"] = config.item_geglu ? "geglu" : "swiglu";
  out["uid_hash_sizes"] = config.uid_hash_sizes;
  out["l2_norm"] = config.l2_norm;
  out["eps"] = config.eps;
  out["temperature"] = config.temperature;
  out["pairing"] = config.pairing == MolPairing::kAll ? "all" : "diagonal";
  if (config.gating == MolGating::kConcatRelu) {
    out["gating"] = "concat_relu";
    out["gating_hidden"] = config.gating_hidden;
  } else {
    out["gating"] = "glu_silu";
    out["gating_query_hidden"] = config.gating_query_hidden;
    out["gating_item_hidden"] = config.gating_item_hidden;
    out["gating_qi_hidden"] = config.gating_qi_hidden;
  }
  return out.dump(2) + "\n";
}

std::vector<MolWeightSpec> MolWeightSpecs(const MolConfig& config) {
  std::vector<MolWeightSpec> specs;
  const int64_t d = config.component_dim, l = config.shape().logits();
  if (config.gating == MolGating::kConcatRelu) {
    for (int64_t c = 0; c < config.query_components; ++c) {
      specs.push_back({absl::StrCat("query_embeddings.", c, ".weight"), {d, config.query_dim}});
    }
    for (int64_t c = 0; c < config.item_components; ++c) {
      specs.push_back({absl::StrCat("item_embeddings.", c, ".weight"), {d, config.item_dim}});
    }
    specs.push_back(
        {"gating_net.0.weight", {config.gating_hidden, config.query_dim + config.item_dim}});
    specs.push_back({"gating_net.2.weight", {l, config.gating_hidden}});
    return specs;
  }
  AddProjection("_query_embeddings_fn._query_emb_proj_module", config.query_dim,
                config.query_hidden, config.projected_components() * d, &specs);
  for (size_t i = 0; i < config.uid_hash_sizes.size(); ++i) {
    specs.push_back({absl::StrCat("_query_embeddings_fn._uid_embeddings_", i, ".weight"),
                     {config.uid_hash_sizes[i] + 1, d}});
  }
  AddProjection("_item_embeddings_fn._item_emb_proj_module", config.item_dim, config.item_hidden,
                config.item_components * d, &specs);
  const auto gate = [&](const std::string& side, int first, int64_t in, int64_t hidden) {
    const std::string prefix = "_gating_fn._" + side + "_partial_module.";
    specs.push_back({absl::StrCat(prefix, first, ".weight"), {hidden, in}});
    specs.push_back({absl::StrCat(prefix, first, ".bias"), {hidden}});
    specs.push_back({absl::StrCat(prefix, first + 2, ".weight"), {l, hidden}});
  };
  gate("query_only", 0, config.query_dim, config.gating_query_hidden);
  gate("item_only", 1, config.item_dim, config.gating_item_hidden);
  const std::string cross = "_gating_fn._qi_partial_module.";
  if (const int64_t h = config.gating_qi_hidden; h > 0) {
    gate("qi", 1, l, h);
    specs.push_back({cross + "3.bias", {l}});
  } else {
    specs.push_back({cross + "1.weight", {l, l}});
    specs.push_back({cross + "1.bias", {l}});
  }
  return specs;
}

}  // namespace trireme
