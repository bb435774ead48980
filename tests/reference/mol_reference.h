// Mixture-of-Logits in double precision, from raw embeddings to scores: one loop a formula, in the
// order of the papers. Row-major; dims as in kernels/mol_ops.h.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/reference/reference.h"

namespace trireme::reference {

struct MolTensor {
  std::vector<int64_t> dims;
  Doubles values;
};

struct MolCase {
  int64_t query_components = 1, item_components = 1, component_dim = 1;
  bool diagonal = false;                       // pairing; the names of the weights follow the gate
  bool concat_relu = false;                    // else glu_silu
  bool query_gelu = false, item_gelu = false;  // geglu, else swiglu
  bool l2_norm = true;
  double eps = 1e-6, temperature = 1.0;
  std::vector<int64_t> uid_hash_sizes;
  std::map<std::string, MolTensor> weights;  // by checkpoint key
};

struct MolResult {
  Doubles query_components;         // [B, Pq, d]
  Doubles item_components;          // [N, Px, d]
  Doubles query_gates, item_gates;  // [B, G], [N, G]
  Doubles logits;                   // [B, N, L]
  Doubles gate_weights;             // [B, N, L]
  Doubles scores;                   // [B, N]
};

// q [B, D_q], user_ids [B] (may be empty without user-id components), x [N, D_x].
MolResult MixtureOfLogits(const MolCase& mol, const Doubles& q,
                          const std::vector<int64_t>& user_ids, const Doubles& x, int64_t batch,
                          int64_t items);

// Fills logits, gate_weights and scores from the other fields. `cross` are the gate's layers: w1
// [H, L] and b1 [H] (empty: none), w2 [L, H or L], b2 [L] (empty: none).
struct MolCross {
  Doubles w1, b1, w2, b2;
};
void MolScore(const MolCase& mol, const MolCross& cross, int64_t batch, int64_t items,
              MolResult* result);

// Row numbers of the k best, score descending, then smaller row; NaN never.
std::vector<int64_t> TopK(const Doubles& scores, int64_t k);

}  // namespace trireme::reference
