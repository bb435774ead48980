#include "tests/reference/mol_reference.h"

#include <algorithm>
#include <cmath>

#include "kernels/check.h"

namespace trireme::reference {
namespace {

double SiluOf(double x) { return x / (1.0 + std::exp(-x)); }
double GeluOf(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

const MolTensor& Weight(const MolCase& mol, const std::string& name) {
  const auto it = mol.weights.find(name);
  CHECK(it != mol.weights.end()) << name;
  return it->second;
}
bool Has(const MolCase& mol, const std::string& name) { return mol.weights.count(name) > 0; }

// y = x W^T + b.
Doubles Linear(const MolCase& mol, const std::string& prefix, const Doubles& x) {
  const MolTensor& w = Weight(mol, prefix + ".weight");
  const Doubles bias =
      Has(mol, prefix + ".bias") ? Weight(mol, prefix + ".bias").values : Doubles();
  return MatMul(x, w.values, bias, w.dims[1]);
}

Doubles Map(Doubles x, double (*f)(double)) {
  for (double& v : x) v = f(v);
  return x;
}

// [lhs | rhs] = x W + b; act(lhs) * rhs. W is input-major.
Doubles Glu(const MolCase& mol, const std::string& prefix, const Doubles& x, bool gelu) {
  const MolTensor& w = Weight(mol, prefix + "._w");
  const Doubles& b = Weight(mol, prefix + "._b").values;
  const int64_t in = w.dims[0], both = w.dims[1], half = both / 2;
  Doubles out;
  for (size_t row = 0; row < x.size(); row += in) {
    Doubles y = b;
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < both; ++j) y[j] += x[row + i] * w.values[i * both + j];
    }
    for (int64_t j = 0; j < half; ++j) {
      out.push_back((gelu ? GeluOf(y[j]) : SiluOf(y[j])) * y[half + j]);
    }
  }
  return out;
}

Doubles Project(const MolCase& mol, const std::string& prefix, const Doubles& x, bool gelu) {
  if (!Has(mol, prefix + ".1._w")) return Linear(mol, prefix + ".1", x);
  return Linear(mol, prefix + ".2", Glu(mol, prefix + ".1", x, gelu));
}

void Normalize(const MolCase& mol, Doubles* x) {
  if (!mol.l2_norm) return;
  const int64_t d = mol.component_dim;
  for (size_t row = 0; row < x->size(); row += d) {
    double squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += (*x)[row + k] * (*x)[row + k];
    for (int64_t k = 0; k < d; ++k) (*x)[row + k] /= std::max(std::sqrt(squares), mol.eps);
  }
}

// The notebook's: one linear layer a component, side by side.
Doubles ProjectPaired(const MolCase& mol, const std::string& side, int64_t count, const Doubles& x,
                      int64_t rows) {
  const int64_t d = mol.component_dim;
  Doubles out(rows * count * d);
  for (int64_t c = 0; c < count; ++c) {
    const Doubles y = Linear(mol, side + "." + std::to_string(c), x);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(y.begin() + r * d, d, out.begin() + (r * count + c) * d);
    }
  }
  return out;
}

// Columns [begin, end) of w times x.
Doubles HalfOfConcat(const MolTensor& w, int64_t begin, int64_t end, const Doubles& x) {
  Doubles half;
  for (int64_t h = 0; h < w.dims[0]; ++h) {
    half.insert(half.end(), w.values.begin() + h * w.dims[1] + begin,
                w.values.begin() + h * w.dims[1] + end);
  }
  return MatMul(x, half, {}, end - begin);
}

Doubles WithUserIds(const MolCase& mol, const Doubles& projected,
                    const std::vector<int64_t>& user_ids, int64_t batch) {
  const int64_t d = mol.component_dim, tables = static_cast<int64_t>(mol.uid_hash_sizes.size());
  const int64_t own = (mol.query_components - tables) * d;
  Doubles out;
  for (int64_t b = 0; b < batch; ++b) {
    out.insert(out.end(), projected.begin() + b * own, projected.begin() + (b + 1) * own);
    for (int64_t i = 0; i < tables; ++i) {
      const int64_t row = user_ids[b] % mol.uid_hash_sizes[i] + 1;
      const Doubles& table =
          Weight(mol, "_query_embeddings_fn._uid_embeddings_" + std::to_string(i) + ".weight")
              .values;
      out.insert(out.end(), table.begin() + row * d, table.begin() + (row + 1) * d);
    }
  }
  return out;
}

void ScorePair(const MolCase& mol, const MolCross& cross, const double* gq, const double* gi,
               const Doubles& s, MolResult* result) {
  Doubles w;
  if (mol.concat_relu) {
    Doubles hidden(cross.w2.size() / s.size());
    for (size_t h = 0; h < hidden.size(); ++h) hidden[h] = std::max(gq[h] + gi[h], 0.0);
    w = MatMul(hidden, cross.w2, cross.b2, static_cast<int64_t>(hidden.size()));
  } else {
    Doubles in = s;
    if (!cross.w1.empty()) {
      in = Map(MatMul(s, cross.w1, cross.b1, static_cast<int64_t>(s.size())), SiluOf);
    }
    w = MatMul(in, cross.w2, cross.b2, static_cast<int64_t>(in.size()));
    for (size_t l = 0; l < w.size(); ++l) w[l] = SiluOf(gq[l] * gi[l] + w[l]);
  }
  const double top = *std::max_element(w.begin(), w.end());
  double total = 0, score = 0;
  for (double& v : w) total += v = std::exp(v - top);
  for (size_t l = 0; l < w.size(); ++l) score += w[l] / total * s[l];
  for (const double v : w) result->gate_weights.push_back(v / total);
  result->logits.insert(result->logits.end(), s.begin(), s.end());
  result->scores.push_back(score);
}

}  // namespace

void MolScore(const MolCase& mol, const MolCross& cross, int64_t batch, int64_t items,
              MolResult* result) {
  const int64_t d = mol.component_dim, pq = mol.query_components, px = mol.item_components;
  const int64_t width = static_cast<int64_t>(result->query_gates.size()) / batch;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t x = 0; x < items; ++x) {
      Doubles s;
      for (int64_t n = 0; n < pq; ++n) {
        for (int64_t m = mol.diagonal ? n : 0; m < (mol.diagonal ? n + 1 : px); ++m) {
          double dot = 0;
          for (int64_t k = 0; k < d; ++k) {
            dot += result->query_components[(b * pq + n) * d + k] *
                   result->item_components[(x * px + m) * d + k];
          }
          s.push_back(dot / mol.temperature);
        }
      }
      ScorePair(mol, cross, &result->query_gates[b * width], &result->item_gates[x * width], s,
                result);
    }
  }
}

MolResult MixtureOfLogits(const MolCase& mol, const Doubles& q,
                          const std::vector<int64_t>& user_ids, const Doubles& x, int64_t batch,
                          int64_t items) {
  MolResult result;
  MolCross cross;
  if (mol.concat_relu) {
    result.query_components =
        ProjectPaired(mol, "query_embeddings", mol.query_components, q, batch);
    result.item_components = ProjectPaired(mol, "item_embeddings", mol.item_components, x, items);
    const MolTensor& w1 = Weight(mol, "gating_net.0.weight");
    const int64_t dq = static_cast<int64_t>(q.size()) / batch;
    result.query_gates = HalfOfConcat(w1, 0, dq, q);
    result.item_gates = HalfOfConcat(w1, dq, w1.dims[1], x);
    cross.w2 = Weight(mol, "gating_net.2.weight").values;
  } else {
    result.query_components = WithUserIds(
        mol, Project(mol, "_query_embeddings_fn._query_emb_proj_module", q, mol.query_gelu),
        user_ids, batch);
    result.item_components =
        Project(mol, "_item_embeddings_fn._item_emb_proj_module", x, mol.item_gelu);
    const std::string g = "_gating_fn._";
    result.query_gates = Linear(mol, g + "query_only_partial_module.2",
                                Map(Linear(mol, g + "query_only_partial_module.0", q), SiluOf));
    result.item_gates = Linear(mol, g + "item_only_partial_module.3",
                               Map(Linear(mol, g + "item_only_partial_module.1", x), SiluOf));
    const std::string c = g + "qi_partial_module.";
    const bool two = Has(mol, c + "3.weight");
    cross.w2 = Weight(mol, c + (two ? "3" : "1") + ".weight").values;
    cross.b2 = Weight(mol, c + (two ? "3" : "1") + ".bias").values;
    if (two) {
      cross.w1 = Weight(mol, c + "1.weight").values;
      cross.b1 = Weight(mol, c + "1.bias").values;
    }
  }
  Normalize(mol, &result.query_components);
  Normalize(mol, &result.item_components);
  MolScore(mol, cross, batch, items, &result);
  return result;
}

std::vector<int64_t> TopK(const Doubles& scores, int64_t k) {
  std::vector<int64_t> rows;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (std::isfinite(scores[i])) rows.push_back(static_cast<int64_t>(i));
  }
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  if (static_cast<int64_t>(rows.size()) > k) rows.resize(k);
  return rows;
}

}  // namespace trireme::reference
