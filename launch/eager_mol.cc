#include "launch/eager_mol.h"

#include <algorithm>
#include <cmath>

#include "kernels/status.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

absl::StatusOr<Tensor> ReadTensor(const SafetensorsFile& file, const std::string& name,
                                  Stream& stream) {
  const TensorEntry& entry = file.header().tensors.at(name);
  const Shape shape =
      entry.dims.size() == 1 ? Shape{entry.dims[0]} : Shape{entry.dims[0], entry.dims[1]};
  ASSIGN_OR_RETURN(Tensor tensor, Tensor::Create(stream.device(), DType::kF32, shape));
  RETURN_IF_ERROR(file.Read(entry.begin, entry.end - entry.begin, tensor.view().data));
  return tensor;
}

// softmax(w * sigmoid(w)) weighted sum of s, row by row.
void CombineRows(const float* s, const float* w, int64_t rows, int64_t logits, float* scores) {
  std::vector<float> gate(logits);
  for (int64_t r = 0; r < rows; ++r, s += logits, w += logits) {
    float top = -INFINITY, total = 0, score = 0;
    for (int64_t l = 0; l < logits; ++l) {
      gate[l] = w[l] / (1.0f + std::exp(-w[l]));
      top = std::max(top, gate[l]);
    }
    for (int64_t l = 0; l < logits; ++l) {
      const float e = std::exp(gate[l] - top);
      total += e;
      score += e * s[l];
    }
    scores[r] = score / total;
  }
}

}  // namespace

absl::StatusOr<EagerMol> EagerMol::Load(const std::string& model_dir, Stream& stream) {
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file,
                   SafetensorsFile::Open(model_dir + "/model.safetensors"));
  const std::string cross = "_gating_fn._qi_partial_module.";
  EagerMol eager;
  ASSIGN_OR_RETURN(const Tensor w1, ReadTensor(*file, cross + "1.weight", stream));
  ASSIGN_OR_RETURN(const Tensor w2, ReadTensor(*file, cross + "3.weight", stream));
  ASSIGN_OR_RETURN(eager.b1, ReadTensor(*file, cross + "1.bias", stream));
  ASSIGN_OR_RETURN(eager.b2, ReadTensor(*file, cross + "3.bias", stream));
  ASSIGN_OR_RETURN(eager.w1, PackLinear(stream, w1.view(), DType::kF32));
  ASSIGN_OR_RETURN(eager.w2, PackLinear(stream, w2.view(), DType::kF32));
  return eager;
}

absl::StatusOr<std::vector<float>> EagerMol::Scores(const MolModel& model, Stream& stream,
                                                    ConstTensorView queries,
                                                    ConstTensorView items) const {
  const MolShape& shape = model.shape();
  const int64_t batch = queries.dim(0), n = items.dim(0), d = shape.component_dim;
  const int64_t pq = shape.query_components, px = shape.item_components, l = shape.logits();
  const auto floats = [&](int64_t rows, int64_t columns) {
    return Tensor::Create(stream.device(), DType::kF32, {rows, columns});
  };
  ASSIGN_OR_RETURN(Arena arena, Arena::Create(stream.device(), model.ArenaBytes(n + batch)));
  ASSIGN_OR_RETURN(const Tensor qc, floats(batch, pq * d));
  ASSIGN_OR_RETURN(const Tensor gq, floats(batch, l));
  ASSIGN_OR_RETURN(const Tensor xc, floats(n, px * d));
  ASSIGN_OR_RETURN(const Tensor gi, floats(n, l));
  const std::vector<int32_t> users = model.UserRows(std::vector<int64_t>(batch));
  const ConstTensorView rows(users.data(), DType::kI32, {model.user_tables(), batch});
  model.ProjectQueries(stream, queries, rows, arena, qc.view(), gq.view());
  model.ProjectItems(stream, items, arena, xc.view(), gi.view());
  // logits [B, N, Pq, Px]: a product for each query, then its transpose.
  ASSIGN_OR_RETURN(const Tensor logits, floats(batch * n, l));
  ASSIGN_OR_RETURN(const Tensor dots, floats(n * px, pq));
  for (int64_t b = 0; b < batch; ++b) {
    const ConstTensorView components(qc.view().row<float>(b), DType::kF32, {pq, d});
    ASSIGN_OR_RETURN(const std::unique_ptr<LinearWeight> weight,
                     PackLinear(stream, components, DType::kF32));
    MatMul(stream, ConstTensorView(xc.view().data, DType::kF32, {n * px, d}), *weight, {},
           dots.view());
    for (int64_t x = 0; x < n; ++x) {
      float* out = logits.view().row<float>(b * n + x);
      for (int64_t i = 0; i < l; ++i) {
        out[i] = dots.view().row<float>(x * px + i % px)[i / px] / shape.temperature;
      }
    }
  }
  ASSIGN_OR_RETURN(const Tensor hidden, floats(batch * n, shape.cross_hidden));
  ASSIGN_OR_RETURN(const Tensor gates, floats(batch * n, l));
  MatMul(stream, logits.view(), *w1, b1.view(), hidden.view());
  Silu(stream, hidden.view());
  MatMul(stream, hidden.view(), *w2, b2.view(), gates.view());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t x = 0; x < n; ++x) {
      float* row = gates.view().row<float>(b * n + x);
      for (int64_t i = 0; i < l; ++i) {
        row[i] += gq.view().row<float>(b)[i] * gi.view().row<float>(x)[i];
      }
    }
  }
  std::vector<float> scores(batch * n);
  CombineRows(logits.view().as<float>(), gates.view().as<float>(), batch * n, l, scores.data());
  return scores;
}

}  // namespace trireme
