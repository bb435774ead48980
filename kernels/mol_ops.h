// The ops of Mixture-of-Logits retrieval ("Revisiting Neural Retrieval on Accelerators", KDD 2023;
// "Retrieval with Learned Similarities", WWW 2025): contract, shapes and cost, as ops.h is for the
// decoder. A device may lack them: ask RequireMol before anything else.
//
// Dims: B queries, N items, D embedding size, Pq / Px components of a query / an item, d component
// size, L logits of a pair, H hidden units of the cross gate, G gate values of an item or query.
// All sums are f32. One (query, item) pair is one fixed chain of operations: its score has the same
// bits in any batch, tile, shard, slot and number of threads, on one backend; backends differ by
// rounding. The CPU computes in f32 throughout. CUDA does so for kF32; for kBF16 and kInt8 it
// rounds queries, and what enters the layers of the cross gate, to bf16 (tensor cores) where the
// head's sizes allow it (the mean of a first stage is compared in f32 everywhere): kAll, kGluSilu
// with H > 0, d a multiple of 16, at most 64 logits with Pq filled up to a multiple of 8.
//
// Memory: every view is of the stream's device, tables and masks included, unless a comment says
// that it is the host's; where the host can read device memory (the CPU backend) they are the same.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace trireme {

enum class MolPairing : uint8_t { kAll, kDiagonal };
enum class MolGating : uint8_t { kGluSilu, kConcatRelu };
// How item components are held. kInt8: one bf16 scale a vector. An item's gate is held as its
// components are, as one vector more.
enum class MolStorage : uint8_t { kF32, kBF16, kInt8 };

// Items lie in blocks of this many slots, slot by slot in neighbouring lanes.
inline constexpr int64_t kMolBlockRows = 32;
// A vector of n values of the 32 items of a block lies as [n / P, 32, P]: P values of an item side
// by side. P is one where a lane is an item (CPU), and what 16 bytes hold, where that divides n, on
// a backend that takes an item's values in such pieces (CUDA): then a single item too is read
// without 15/16 of each sector going to waste.
int64_t MolPiece(const Stream& stream, MolStorage storage, int64_t n);
// Where value k of the item in a lane lies in its block of the vector.
inline int64_t MolPlace(int64_t k, int64_t lane, int64_t piece) {
  return (k / piece * kMolBlockRows + lane) * piece + k % piece;
}
// k of one query; the first stage of a two-stage search asks for more than the answer does.
inline constexpr int64_t kMolMaxK = 1 << 20;

struct MolShape {
  int64_t query_components = 0;  // Pq
  int64_t item_components = 0;   // Px
  int64_t component_dim = 0;     // d
  int64_t cross_hidden = 0;      // H; 0: the cross gate of kGluSilu is one linear layer
  MolPairing pairing = MolPairing::kAll;
  MolGating gating = MolGating::kGluSilu;
  float temperature = 1.0f;

  // Logit l = n * Px + m pairs query component n with item component m; diagonal: l pairs l with l.
  int64_t logits() const {
    return pairing == MolPairing::kAll ? query_components * item_components : item_components;
  }
  // G: a partial per logit (kGluSilu), or the half of the hidden layer that the item makes
  // (kConcatRelu).
  int64_t gate_width() const { return gating == MolGating::kGluSilu ? logits() : cross_hidden; }
};

// The gate's weights, packed once at load. Owned by the model, never changed.
class MolGateWeights {
 public:
  virtual ~MolGateWeights() = default;
  MolShape shape;
  int64_t bytes = 0;
};

// Host memory, f32, contiguous. kGluSilu: w1 [H, L], b1 [H], w2 [L, H], b2 [L]; with H = 0 only
// w2 [L, L] and b2 [L]. kConcatRelu: w2 [L, H] alone.
struct MolGateTensors {
  ConstTensorView w1 = {}, b1 = {}, w2 = {}, b2 = {};
};

// One shard's items on the device; `slots` is a multiple of kMolBlockRows. Memory is counted in
// elements of the storage type (kInt8: bytes); of vectors the last two dims are as MolPlace says.
struct MolTableView {
  MolStorage storage = MolStorage::kF32;
  int64_t slots = 0;
  void* components = nullptr;   // [slots / 32, Px, d, 32]
  BF16* scales = nullptr;       // [slots / 32, Px, 32]; kInt8 alone
  void* gates = nullptr;        // [slots / 32, G, 32]
  BF16* gate_scales = nullptr;  // [slots / 32, 32]; kInt8 alone
  void* means = nullptr;        // [slots / 32, d, 32] mean component, or none
  BF16* mean_scales = nullptr;  // [slots / 32, 32]; kInt8 alone
  // Place of each slot's item in the table's total order: ties go to the smaller one. [slots]
  uint32_t* order = nullptr;
};
// Bytes of one slot: components, scales, gates and, if held, the mean; ids and order are extra.
int64_t MolSlotBytes(const MolShape& shape, MolStorage storage, bool means);

// B projected queries.
struct MolQueries {
  ConstTensorView components;  // [B, Pq * d] f32
  ConstTensorView gates;       // [B, G] f32
};

// Which items a query may be answered with.
struct MolAllowed {
  ConstTensorView masks;       // [F, slots / 32] i32: bit b of word w allows slot 32 w + b
  ConstTensorView query_mask;  // [B] i32: each query's row of `masks`
  // Slots a query excludes besides: [B + 1] i32 and [E] i32, ascending in each query's range. Both
  // may be empty.
  ConstTensorView excluded_begin, excluded;
};

// Per list the k best, best first: descending key. A key is the score's order-preserving bits above
// the inverted place in the total order, so that no two are equal. Unused ones: key 0, slot -1.
struct MolTopK {
  TensorView keys;   // [lists, k] i64, the bits of a uint64_t
  TensorView slots;  // [lists, k] i32
};

// Work done. The search ops add it to their argument `counts`, [3] i64 in this order, which may be
// none. Pairs a pruning scan gates depend on the backend.
struct MolScanCounts {
  int64_t pairs = 0;       // pairs whose dot products were computed
  int64_t gated = 0;       // of them those that went through the gate
  int64_t not_finite = 0;  // scores that came out NaN or infinite; never answered
};

// What a scan op works in besides its arguments and results is its workspace: bytes of the stream's
// device that the caller brings, aligned to 256, with contents that are nobody's. It may be used
// again by what is enqueued next. A backend whose device memory is the host's heap (the CPU) needs
// none and works there; so the scan ops take no memory of a device.
enum class MolScanOp : uint8_t { kSearch, kAverage, kLogits, kCandidates, kRescore };
struct MolScanSize {
  MolScanOp op = MolScanOp::kSearch;
  MolStorage storage = MolStorage::kF32;
  int64_t batch = 0;
  int64_t items = 0;  // slots of the table; kRescore: room for candidates of all queries
  int64_t k = 1;
};
// What suffices for some number of items suffices for fewer.
int64_t MolWorkspaceBytes(const Stream& stream, const MolShape& shape, const MolScanSize& size);

inline uint64_t MolKey(float score, uint32_t order) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~order;
}
inline float MolKeyScore(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}
// Rounding can lift a score, one sum of L terms over another, above its largest logit: by no more
// than 2 L 2^-24 of it (Higham, Accuracy and Stability of Numerical Algorithms, 3.1, for sums of
// one sign, which the weights are) and what the exponentials add.
constexpr float MolPruneMargin(int64_t logits) {
  return 1e-5f + static_cast<float>(logits) * 0x1p-23f;
}
// A pair is pruned only where its largest logit is below this.
inline float MolPruneFloor(float score, int64_t logits) {
  return score - MolPruneMargin(logits) * (score < 0 ? -score : score) - 1e-6f;
}

// Unimplemented, with the device's name, where the stream's device lacks these ops.
absl::Status RequireMol(const Stream& stream);

absl::StatusOr<std::unique_ptr<MolGateWeights>> PackMolGate(Stream& stream, const MolShape& shape,
                                                            const MolGateTensors& tensors);

// In place, x [T, K] f32: x * sigmoid(x).
void Silu(Stream& stream, TensorView x);
// gate_up [T, 2 I] f32, out [T, I] f32: gelu(gate) * up, gelu being the exact erf form.
void GeluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out);
// In place, x [T, P * dim] f32: each vector of `dim` divided by max(its l2 norm, eps). NaN where
// the sum of squares overflows: who made it looks for that, and a zero would go unnoticed.
void L2Normalize(Stream& stream, TensorView x, int64_t dim, float eps);

// Puts projected items into slots: components [n, Px * d] f32, gates [n, G] f32, slots [n] i32
// (distinct, below table.slots). Rounds to the table's storage; order is the caller's.
void MolStore(Stream& stream, const MolShape& shape, ConstTensorView components,
              ConstTensorView gates, ConstTensorView slots, const MolTableView& table);

// The k best scores of every query over all allowed items; `prune` skips the gate of pairs whose
// largest logit (a score never exceeds it) is below the k-th best so far: same answer, less work.
// The [B, N] scores are never stored. topk [B, k].
void MolSearch(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView workspace, TensorView counts);

// First stages. Average: the k largest <sum of the query's components, mean of the item's> / Pq;
// from the table's means, or where it has none from the components. topk [B, k].
void MolAverageTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView workspace, TensorView counts);
// Per embedding: for each of the L logits the k items with the largest. topk [B * L, k].
void MolLogitTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView workspace, TensorView counts);

// Of every list of a first stage the k-th best key over all ranks, 0 where there are fewer: keys
// [ranks * lists, k] i64 as MolTopK's, rank after rank; last [lists] i64.
void MolLastKeys(Stream& stream, ConstTensorView keys, TensorView last);
// A first stage of B queries: n lists each of this shard, and what MolLastKeys gives for them.
struct MolStage {
  MolTopK found;         // [B * n, k]
  ConstTensorView last;  // [B * n] i64
};
// What the second stage scores: the slots in a query's lists whose keys reach the last of their
// list, each slot once. begin [B + 1] i32, candidates [C] i32, slots below `slots`, ascending in
// each query's range; C: room for B times the lists' lengths or `slots`, whichever is less.
void MolCandidates(Stream& stream, std::span<const MolStage> stages, int64_t slots,
                   TensorView begin, TensorView candidates, TensorView workspace);

// Second stage: the k best scores among each query's candidates, [B + 1] i32 and [C] i32 slots,
// ascending in each query's range, allowed ones only; what lies behind the last range is not read.
// topk [B, k].
void MolRescore(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView workspace,
                TensorView counts);

// What scoring `pairs` pairs over `items` items read once must do and move.
OpCost MolScoreCost(const MolShape& shape, MolStorage storage, int64_t items, int64_t pairs);

}  // namespace trireme
