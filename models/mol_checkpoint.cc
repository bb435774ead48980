#include "models/mol_checkpoint.h"

#include <cmath>
#include <memory>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/status.h"
#include "models/json_file.h"
#include "models/output_directory.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

struct Recipe {
  const char* name;
  int64_t dim, query_components, item_components, component_dim;
  bool query_geglu;
  int64_t user_ids;  // 0 = no user-id component
};
constexpr Recipe kRecipes[] = {
    {"mol-8x4x64", 50, 8, 4, 64, false, 6040},
    {"mol-8x4x128", 256, 8, 4, 128, false, 16384},
    {"mol-8x8x32", 64, 8, 8, 32, true, 0},
};

// Uniform in (0, 1), a hash of (seed, n): splitmix64.
double Uniform(uint64_t seed, uint64_t n) {
  uint64_t z = seed + (n + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (static_cast<double>((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
}

std::vector<float> Normal(uint64_t seed, int64_t count, double deviation) {
  NormalSequence sequence(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(deviation * sequence.Next());
  return values;
}

// What an identity projection has for this tensor: ones on the diagonal, no bias.
std::vector<float> Identity(const MolWeightSpec& spec, int64_t count) {
  std::vector<float> values(count);
  if (spec.dims.size() == 1) return values;
  CHECK_EQ(spec.dims[0], spec.dims[1]) << spec.name;
  for (int64_t i = 0; i < spec.dims[0]; ++i) values[i * spec.dims[1] + i] = 1.0f;
  return values;
}

double Deviation(const MolWeightSpec& spec) {
  const std::string& name = spec.name;
  if (name.ends_with(".bias") || name.ends_with("._b")) return 0.1;
  // `_w` lies input-major; a user-id table has no inputs.
  const int64_t inputs = name.ends_with("._w") ? spec.dims[0] : spec.dims[1];
  double scale = 1.0;
  if (name.find("_qi_partial_module.1") != std::string::npos) scale = 0.4;
  if (name.find("_qi_partial_module.3") != std::string::npos) scale = 2.5;
  return scale / std::sqrt(static_cast<double>(inputs));
}

}  // namespace

double NormalSequence::NextUniform() { return Uniform(seed_, next_++); }

double NormalSequence::Next() {
  const double radius = std::sqrt(-2.0 * std::log(NextUniform()));
  return radius * std::cos(2.0 * std::numbers::pi * NextUniform());
}

std::vector<std::string> MolRecipeNames() {
  std::vector<std::string> names;
  for (const Recipe& recipe : kRecipes) names.push_back(recipe.name);
  return names;
}

absl::StatusOr<MolConfig> MolRecipeConfig(const std::string& like) {
  for (const Recipe& recipe : kRecipes) {
    if (like != recipe.name) continue;
    MolConfig config;
    config.query_dim = config.item_dim = recipe.dim;
    config.query_components = recipe.query_components;
    config.item_components = recipe.item_components;
    config.component_dim = recipe.component_dim;
    config.query_hidden = 512;
    config.query_geglu = config.item_geglu = recipe.query_geglu;
    if (recipe.user_ids > 0) config.uid_hash_sizes = {recipe.user_ids};
    config.temperature = 0.05;
    config.gating_query_hidden = config.gating_item_hidden = config.gating_qi_hidden = 128;
    return config;
  }
  return absl::InvalidArgumentError(absl::StrCat("no Mixture-of-Logits head called ", Quoted(like),
                                                 " is known; known are ",
                                                 absl::StrJoin(MolRecipeNames(), ", ")));
}

absl::Status MakeMolCheckpoint(const MolConfig& config, const std::string& out_dir, uint64_t seed,
                               bool identity_projections) {
  if (out_dir.empty()) return absl::InvalidArgumentError("the output directory has no name");
  const std::vector<MolWeightSpec> specs = MolWeightSpecs(config);
  std::vector<SafetensorsWriter::Declared> declared;
  int64_t bytes = 0;
  for (const MolWeightSpec& spec : specs) {
    int64_t count = 1;
    for (const int64_t dim : spec.dims) count *= dim;
    bytes += count * 4;
    declared.push_back({spec.name, DType::kF32, spec.dims});
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<OutputDirectory> out, OutputDirectory::Claim(out_dir));
  RETURN_IF_ERROR(CheckSpace(out->path(), bytes));
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                   SafetensorsWriter::Create(out->Add("model.safetensors"), declared));
  for (size_t i = 0; i < specs.size(); ++i) {
    int64_t count = 1;
    for (const int64_t dim : specs[i].dims) count *= dim;
    const bool identity =
        identity_projections && specs[i].name.find("_emb_proj_module") != std::string::npos;
    const std::vector<float> values =
        identity ? Identity(specs[i], count)
                 : Normal(seed * 1000003 + i * 0x5851f42d4c957f2du, count, Deviation(specs[i]));
    RETURN_IF_ERROR(writer->Append(values.data(), count * 4));
  }
  RETURN_IF_ERROR(writer->Finish());
  // Last, so that a directory with a config.json is a whole checkpoint.
  RETURN_IF_ERROR(WriteText(out->Add("config.json"), MolConfigJson(config)));
  out->Keep();
  return absl::OkStatus();
}

}  // namespace trireme
