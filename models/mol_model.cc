#include "models/mol_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/status.h"
#include "models/float_convert.h"
#include "models/json_file.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

constexpr char kTrainingPrefix[] = "module._ndp_module.";
constexpr char kItemProjection[] = "_item_embeddings_fn._item_emb_proj_module.";
constexpr char kOldItemProjection[] = "_item_proj_module.";

// A checkpoint's own name for a key: as it is, with the training wrapper's prefix, or as old
// checkpoints call the item projection.
const TensorEntry* FindEntry(const SafetensorsHeader& header, const std::string& name,
                             std::set<std::string>* used) {
  std::vector<std::string> names = {name, kTrainingPrefix + name};
  if (name.rfind(kItemProjection, 0) == 0) {
    const std::string old = kOldItemProjection + name.substr(sizeof(kItemProjection) - 1);
    names.push_back(old);
    names.push_back(kTrainingPrefix + old);
  }
  for (const std::string& candidate : names) {
    const auto it = header.tensors.find(candidate);
    if (it == header.tensors.end()) continue;
    used->insert(candidate);
    return &it->second;
  }
  return nullptr;
}

std::string ShapeText(const std::vector<int64_t>& dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ", "), "]");
}

absl::StatusOr<std::vector<float>> ReadFloats(const SafetensorsFile& file, const TensorEntry& entry,
                                              const MolWeightSpec& spec) {
  const std::string where = absl::StrCat(file.path(), ": tensor ", Quoted(spec.name), ": ");
  if (entry.dims != spec.dims) {
    return absl::InvalidArgumentError(absl::StrCat(where, "is ", ShapeText(entry.dims),
                                                   "; the config.json beside it needs ",
                                                   ShapeText(spec.dims)));
  }
  if (!entry.foreign_dtype.empty() || !IsFloat(entry.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, "has dtype ", entry.foreign_dtype.empty() ? Name(entry.dtype) : entry.foreign_dtype,
        "; must be F32, BF16 or F16"));
  }
  int64_t count = 1;
  for (const int64_t dim : spec.dims) count *= dim;
  std::vector<char> raw(entry.end - entry.begin);
  RETURN_IF_ERROR(file.Read(entry.begin, entry.end - entry.begin, raw.data()));
  std::vector<float> values(count);
  ConvertFloats(entry.dtype, raw.data(), DType::kF32, values.data(), count);
  if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
    return absl::InvalidArgumentError(absl::StrCat(where, "holds NaN or infinite values"));
  }
  return values;
}

}  // namespace

// The tensors of one checkpoint on their way into a model.
class MolModel::Loader {
 public:
  Loader(MolModel& model, Stream& stream) : model_(model), stream_(stream) {}

  absl::Status Read(const std::string& path) {
    ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
    std::set<std::string> used;
    for (const MolWeightSpec& spec : MolWeightSpecs(model_.config_)) {
      const TensorEntry* entry = FindEntry(file->header(), spec.name, &used);
      if (entry == nullptr) {
        return absl::NotFoundError(absl::StrCat(path, ": tensor ", Quoted(spec.name), " ",
                                                ShapeText(spec.dims),
                                                " is missing; the config.json beside it needs it"));
      }
      ASSIGN_OR_RETURN(values_[spec.name], ReadFloats(*file, *entry, spec));
      dims_[spec.name] = spec.dims;
    }
    for (const auto& [name, entry] : file->header().tensors) {
      // The item embeddings themselves are not part of the head.
      if (used.count(name) > 0 || name.find("_embedding_module.") != std::string::npos) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": tensor ", Quoted(name), " is no part of the head that config.json describes"));
    }
    return absl::OkStatus();
  }

  // FNV-1a over the config's text and the weights in the order of their names.
  uint64_t Fingerprint() const {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto add = [&hash](uint32_t word) { hash = (hash ^ word) * 0x100000001b3u; };
    for (const char c : MolConfigJson(model_.config_)) add(static_cast<unsigned char>(c));
    for (const auto& [name, values] : values_) {
      for (const float value : values) add(std::bit_cast<uint32_t>(value));
    }
    return hash;
  }

  absl::Status Build() {
    if (model_.config_.gating == MolGating::kConcatRelu) return BuildConcat();
    const MolConfig& config = model_.config_;
    RETURN_IF_ERROR(BuildProjection("_query_embeddings_fn._query_emb_proj_module",
                                    config.query_hidden, config.query_geglu, &model_.query_));
    for (size_t i = 0; i < config.uid_hash_sizes.size(); ++i) {
      const std::string name = absl::StrCat("_query_embeddings_fn._uid_embeddings_", i, ".weight");
      model_.user_tables_.emplace_back();
      RETURN_IF_ERROR(
          Pack(values_[name], dims_[name][0], dims_[name][1], &model_.user_tables_.back()));
    }
    RETURN_IF_ERROR(BuildProjection("_item_embeddings_fn._item_emb_proj_module", config.item_hidden,
                                    config.item_geglu, &model_.item_));
    RETURN_IF_ERROR(BuildPartial("_gating_fn._query_only_partial_module.", 0, &model_.query_gate_));
    RETURN_IF_ERROR(BuildPartial("_gating_fn._item_only_partial_module.", 1, &model_.item_gate_));
    const std::string cross = "_gating_fn._qi_partial_module.";
    const bool two = config.gating_qi_hidden > 0;
    MolGateTensors tensors;
    if (two) {
      tensors.w1 = View(cross + "1.weight");
      tensors.b1 = View(cross + "1.bias");
    }
    tensors.w2 = View(cross + (two ? "3.weight" : "1.weight"));
    tensors.b2 = View(cross + (two ? "3.bias" : "1.bias"));
    return BuildGate(tensors);
  }

 private:
  absl::Status Pack(const std::vector<float>& values, int64_t n, int64_t k,
                    std::unique_ptr<LinearWeight>* out) {
    ASSIGN_OR_RETURN(*out, PackLinear(stream_, ConstTensorView(values.data(), DType::kF32, {n, k}),
                                      DType::kF32));
    model_.weight_bytes_ += (*out)->bytes;
    return absl::OkStatus();
  }
  absl::Status Bias(const std::string& name, Tensor* out) {
    const std::vector<float>& values = values_[name];
    const auto n = static_cast<int64_t>(values.size());
    ASSIGN_OR_RETURN(*out, Tensor::Create(stream_.device(), DType::kF32, {n}));
    stream_.Copy(out->view().data, values.data(), values.size() * sizeof(float));
    model_.weight_bytes_ += out->bytes();
    return stream_.Synchronize();
  }
  absl::Status BuildLinear(const std::string& prefix, bool bias, Linear* out) {
    const std::string name = prefix + ".weight";
    RETURN_IF_ERROR(Pack(values_[name], dims_[name][0], dims_[name][1], &out->weight));
    return bias ? Bias(prefix + ".bias", &out->bias) : absl::OkStatus();
  }
  absl::Status BuildProjection(const std::string& prefix, int64_t hidden, bool geglu,
                               Projection* out) {
    if (hidden == 0) return BuildLinear(prefix + ".1", true, &out->out);
    out->geglu = geglu;
    // The GLU's weight lies input-major.
    const std::vector<float>& w = values_[prefix + ".1._w"];
    const int64_t in = dims_[prefix + ".1._w"][0], both = 2 * hidden;
    std::vector<float> transposed(w.size());
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < both; ++j) transposed[j * in + i] = w[i * both + j];
    }
    RETURN_IF_ERROR(Pack(transposed, both, in, &out->glu.weight));
    RETURN_IF_ERROR(Bias(prefix + ".1._b", &out->glu.bias));
    return BuildLinear(prefix + ".2", true, &out->out);
  }
  absl::Status BuildPartial(const std::string& prefix, int first, GatePartial* out) {
    RETURN_IF_ERROR(BuildLinear(absl::StrCat(prefix, first), true, &out->hidden));
    return BuildLinear(absl::StrCat(prefix, first + 2), false, &out->out);
  }
  absl::Status BuildGate(const MolGateTensors& tensors) {
    ASSIGN_OR_RETURN(model_.gate_, PackMolGate(stream_, model_.shape_, tensors));
    model_.weight_bytes_ += model_.gate_->bytes;
    return absl::OkStatus();
  }

  // One bias-free layer a component, side by side; the gate's first layer splits into the query's
  // and the item's half.
  absl::Status BuildConcat() {
    const MolConfig& config = model_.config_;
    const auto stacked = [&](const char* side, int64_t count, int64_t dim, Linear* out) {
      std::vector<float> all;
      for (int64_t c = 0; c < count; ++c) {
        const std::vector<float>& w = values_[absl::StrCat(side, ".", c, ".weight")];
        all.insert(all.end(), w.begin(), w.end());
      }
      return Pack(all, count * config.component_dim, dim, &out->weight);
    };
    RETURN_IF_ERROR(
        stacked("query_embeddings", config.query_components, config.query_dim, &model_.query_.out));
    RETURN_IF_ERROR(
        stacked("item_embeddings", config.item_components, config.item_dim, &model_.item_.out));
    const std::vector<float>& w1 = values_["gating_net.0.weight"];
    const int64_t width = config.query_dim + config.item_dim;
    const auto half = [&](int64_t begin, int64_t dim, Linear* out) {
      std::vector<float> part;
      for (int64_t h = 0; h < config.gating_hidden; ++h) {
        const float* row = w1.data() + h * width + begin;
        part.insert(part.end(), row, row + dim);
      }
      return Pack(part, config.gating_hidden, dim, &out->weight);
    };
    RETURN_IF_ERROR(half(0, config.query_dim, &model_.query_gate_.out));
    RETURN_IF_ERROR(half(config.query_dim, config.item_dim, &model_.item_gate_.out));
    MolGateTensors tensors;
    tensors.w2 = View("gating_net.2.weight");
    return BuildGate(tensors);
  }

  ConstTensorView View(const std::string& name) {
    const std::vector<int64_t>& dims = dims_[name];
    const Shape shape = dims.size() == 1 ? Shape{dims[0]} : Shape{dims[0], dims[1]};
    return ConstTensorView(values_[name].data(), DType::kF32, shape);
  }

  MolModel& model_;
  Stream& stream_;
  std::map<std::string, std::vector<float>> values_;
  std::map<std::string, std::vector<int64_t>> dims_;
};

absl::StatusOr<std::unique_ptr<MolModel>> MolModel::Load(const std::string& model_dir,
                                                         Stream& stream) {
  RETURN_IF_ERROR(RequireMol(stream));
  std::unique_ptr<MolModel> model(new MolModel);
  ASSIGN_OR_RETURN(model->config_, LoadMolConfig(model_dir));
  model->shape_ = model->config_.shape();
  Loader loader(*model, stream);
  RETURN_IF_ERROR(loader.Read(model_dir + "/model.safetensors"));
  RETURN_IF_ERROR(loader.Build());
  model->fingerprint_ = loader.Fingerprint();
  return model;
}

size_t MolModel::ArenaBytes(int64_t rows) const {
  const int64_t glu = std::max(config_.query_hidden, config_.item_hidden);
  const int64_t gate = std::max(config_.gating_query_hidden, config_.gating_item_hidden);
  return Arena::Footprint(DType::kF32, {rows, 2 * glu}) +
         Arena::Footprint(DType::kF32, {rows, glu}) + Arena::Footprint(DType::kF32, {rows, gate});
}

void MolModel::Project(Stream& stream, const Projection& projection, ConstTensorView x,
                       Arena& arena, TensorView components) const {
  const size_t mark = arena.used();
  ConstTensorView in = x;
  if (projection.glu.weight != nullptr) {
    const int64_t both = projection.glu.weight->n;
    const TensorView gate_up = arena.Allocate(DType::kF32, {x.dim(0), both});
    const TensorView hidden = arena.Allocate(DType::kF32, {x.dim(0), both / 2});
    MatMul(stream, x, *projection.glu.weight, projection.glu.bias.view(), gate_up);
    projection.geglu ? GeluAndMul(stream, gate_up, hidden) : SiluAndMul(stream, gate_up, hidden);
    in = hidden;
  }
  MatMul(stream, in, *projection.out.weight, projection.out.bias.view(), components);
  arena.Rewind(mark);
}

void MolModel::Partial(Stream& stream, const GatePartial& partial, ConstTensorView x, Arena& arena,
                       TensorView gates) const {
  if (partial.hidden.weight == nullptr) return MatMul(stream, x, *partial.out.weight, {}, gates);
  const size_t mark = arena.used();
  const TensorView hidden = arena.Allocate(DType::kF32, {x.dim(0), partial.hidden.weight->n});
  MatMul(stream, x, *partial.hidden.weight, partial.hidden.bias.view(), hidden);
  Silu(stream, hidden);
  MatMul(stream, hidden, *partial.out.weight, {}, gates);
  arena.Rewind(mark);
}

std::vector<int32_t> MolModel::UserRows(const std::vector<int64_t>& user_ids) const {
  std::vector<int32_t> rows;
  for (const int64_t size : config_.uid_hash_sizes) {
    for (const int64_t id : user_ids) {
      CHECK_GE(id, 0);
      rows.push_back(static_cast<int32_t>(id % size + 1));
    }
  }
  return rows;
}

void MolModel::ProjectQueries(Stream& stream, ConstTensorView q, ConstTensorView user_rows,
                              Arena& arena, TensorView components, TensorView gates) const {
  const int64_t d = config_.component_dim, projected = config_.projected_components();
  CHECK_EQ(q.dim(1), config_.query_dim) << "query embeddings";
  Project(stream, query_, q, arena, components.Columns(0, projected * d));
  for (int64_t i = 0; i < user_tables(); ++i) {
    CHECK(user_rows.shape == (Shape{user_tables(), q.dim(0)})) << "rows of user ids";
    const ConstTensorView rows(user_rows.row<int32_t>(i), DType::kI32, {q.dim(0)});
    Embedding(stream, rows, *user_tables_[i], 0, components.Columns((projected + i) * d, d));
  }
  if (config_.l2_norm) L2Normalize(stream, components, d, static_cast<float>(config_.eps));
  Partial(stream, query_gate_, q, arena, gates);
}

void MolModel::ProjectItems(Stream& stream, ConstTensorView x, Arena& arena, TensorView components,
                            TensorView gates) const {
  CHECK_EQ(x.dim(1), config_.item_dim) << "item embeddings";
  Project(stream, item_, x, arena, components);
  if (config_.l2_norm) {
    L2Normalize(stream, components, config_.component_dim, static_cast<float>(config_.eps));
  }
  Partial(stream, item_gate_, x, arena, gates);
}

}  // namespace trireme
