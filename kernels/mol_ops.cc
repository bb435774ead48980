#include "kernels/mol_ops.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check_tensor.h"
#include "kernels/mol_op_table.h"
#include "kernels/op_table.h"

// One place for the shape and dtype rules of the MoL ops.
namespace trireme {
namespace {

void CheckMatrix(const ConstTensorView& view, const char* what) {
  CHECK_EQ(view.shape.rank, 2) << what << " must be a matrix";
  CheckTensor(view, view.shape, DType::kF32, what);
}

const MolOpTable& Ops(const Stream& stream) {
  CHECK(stream.ops().mol != nullptr) << "ask RequireMol first";
  return *stream.ops().mol;
}

void CheckShape(const MolShape& shape) {
  CHECK(shape.query_components > 0 && shape.item_components > 0 && shape.component_dim > 0);
  CHECK(shape.pairing == MolPairing::kAll || shape.query_components == shape.item_components)
      << "paired components need as many of the query as of the item";
  CHECK_GT(shape.gate_width(), 0);
  CHECK_GT(shape.temperature, 0.0f);
}

void CheckTable(const MolTableView& table) {
  CHECK_EQ(table.slots % kMolBlockRows, 0) << "slots";
  CHECK(table.slots < INT32_MAX) << table.slots << " slots";
  CHECK(table.slots == 0 || (table.components != nullptr && table.gates != nullptr));
  CHECK(table.storage != MolStorage::kInt8 || table.slots == 0 ||
        (table.scales != nullptr && table.gate_scales != nullptr));
}

void CheckQueries(const MolShape& shape, const MolQueries& queries) {
  const int64_t batch = queries.components.dim(0);
  CheckTensor(queries.components, {batch, shape.query_components * shape.component_dim},
              DType::kF32, "query components");
  CheckTensor(queries.gates, {batch, shape.gate_width()}, DType::kF32, "query gates");
}

void CheckLists(const ConstTensorView& begin, const ConstTensorView& list, int64_t batch,
                const char* what) {
  CheckTensor(begin, {batch + 1}, DType::kI32, what);
  CheckTensor(list, {list.dim(0)}, DType::kI32, what);
}

void CheckAllowed(const MolAllowed& allowed, int64_t batch, const MolTableView& table) {
  CHECK_EQ(allowed.masks.shape.rank, 2) << "masks";
  CheckTensor(allowed.masks, {allowed.masks.dim(0), table.slots / kMolBlockRows}, DType::kI32,
              "masks");
  CheckTensor(allowed.query_mask, {batch}, DType::kI32, "query_mask");
  if (allowed.excluded_begin) {
    CheckLists(allowed.excluded_begin, allowed.excluded, batch, "excluded");
  }
}

void CheckTopK(const MolTopK& topk, int64_t lists) {
  const int64_t k = topk.keys.dim(1);
  CHECK(k >= 1 && k <= kMolMaxK) << "k is " << k;
  CheckTensor(topk.keys, {lists, k}, DType::kI64, "keys");
  CheckTensor(topk.slots, {lists, k}, DType::kI32, "slots");
}

void CheckCounts(const TensorView& counts) {
  if (counts) CheckTensor(counts, {3}, DType::kI64, "counts");
}

// `size`: op and items alone.
void CheckWorkspace(const Stream& stream, const MolShape& shape, MolScanSize size,
                    const MolQueries& queries, const MolTableView& table, const MolTopK& topk,
                    const TensorView& workspace) {
  size.storage = table.storage;
  size.batch = queries.components.dim(0);
  size.k = topk.keys.dim(1);
  const int64_t bytes = MolWorkspaceBytes(stream, shape, size);
  if (bytes == 0) return;
  CHECK(workspace.contiguous() && workspace.bytes() >= bytes)
      << "the workspace has " << workspace.bytes() << " bytes, needs " << bytes;
}

int64_t ElementBytes(MolStorage storage) {
  return storage == MolStorage::kF32 ? 4 : storage == MolStorage::kBF16 ? 2 : 1;
}

}  // namespace

absl::Status RequireMol(const Stream& stream) {
  if (stream.ops().mol != nullptr) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat("device ", stream.device().spec().name,
                   ": Mixture-of-Logits retrieval does not run on this device; use --device cpu"));
}

int64_t MolSlotBytes(const MolShape& shape, MolStorage storage, bool means) {
  const int64_t vectors = shape.item_components + (means ? 1 : 0);
  const int64_t scale_bytes = storage == MolStorage::kInt8 ? 2 : 0;
  return (vectors * shape.component_dim + shape.gate_width()) * ElementBytes(storage) +
         (vectors + 1) * scale_bytes;
}

int64_t MolPiece(const Stream& stream, MolStorage storage, int64_t n) {
  const int64_t piece = std::max<int64_t>(1, Ops(stream).piece_bytes / ElementBytes(storage));
  return n % piece == 0 ? piece : 1;
}

absl::StatusOr<std::unique_ptr<MolGateWeights>> PackMolGate(Stream& stream, const MolShape& shape,
                                                            const MolGateTensors& tensors) {
  CheckShape(shape);
  const int64_t l = shape.logits(), h = shape.cross_hidden;
  const bool glu = shape.gating == MolGating::kGluSilu;
  CHECK(glu || h > 0);
  if (glu && h > 0) {
    CheckTensor(tensors.w1, {h, l}, DType::kF32, "w1");
    CheckTensor(tensors.b1, {h}, DType::kF32, "b1");
  }
  CheckTensor(tensors.w2, {l, h > 0 ? h : l}, DType::kF32, "w2");
  if (glu) {
    CheckTensor(tensors.b2, {l}, DType::kF32, "b2");
  } else {
    CHECK(!tensors.w1 && !tensors.b1 && !tensors.b2) << "kConcatRelu has w2 alone";
  }
  return Ops(stream).pack_gate(stream, shape, tensors);
}

void Silu(Stream& stream, TensorView x) {
  CheckMatrix(x, "x");
  Ops(stream).silu(stream, x);
}

void GeluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  CheckMatrix(out, "out");
  CheckTensor(gate_up, {out.dim(0), 2 * out.dim(1)}, DType::kF32, "gate_up");
  Ops(stream).gelu_and_mul(stream, gate_up, out);
}

void L2Normalize(Stream& stream, TensorView x, int64_t dim, float eps) {
  CheckMatrix(x, "x");
  CHECK(dim > 0 && x.dim(1) % dim == 0)
      << "x has " << x.dim(1) << " columns, no multiple of " << dim;
  Ops(stream).l2_normalize(stream, x, dim, eps);
}

void MolStore(Stream& stream, const MolShape& shape, ConstTensorView components,
              ConstTensorView gates, ConstTensorView slots, const MolTableView& table) {
  CheckShape(shape);
  CheckTable(table);
  const int64_t n = slots.dim(0);
  CheckTensor(slots, {n}, DType::kI32, "slots");
  CheckTensor(components, {n, shape.item_components * shape.component_dim}, DType::kF32,
              "item components");
  CheckTensor(gates, {n, shape.gate_width()}, DType::kF32, "item gates");
  Ops(stream).store(stream, shape, components, gates, slots, table);
}

int64_t MolWorkspaceBytes(const Stream& stream, const MolShape& shape, const MolScanSize& size) {
  CheckShape(shape);
  CHECK(size.batch >= 0 && size.items >= 0 && size.k >= 1 && size.k <= kMolMaxK);
  return Ops(stream).workspace_bytes(stream, shape, size);
}

void MolSearch(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView workspace, TensorView counts) {
  CheckTable(table);
  CheckQueries(gate.shape, queries);
  CheckAllowed(allowed, queries.components.dim(0), table);
  CheckTopK(topk, queries.components.dim(0));
  CheckWorkspace(stream, gate.shape, {.op = MolScanOp::kSearch, .items = table.slots}, queries,
                 table, topk, workspace);
  CheckCounts(counts);
  Ops(stream).search(stream, gate, queries, table, allowed, prune, topk, workspace, counts);
}

void MolAverageTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView workspace, TensorView counts) {
  CheckTable(table);
  CheckQueries(shape, queries);
  CheckAllowed(allowed, queries.components.dim(0), table);
  CheckTopK(topk, queries.components.dim(0));
  CheckWorkspace(stream, shape, {.op = MolScanOp::kAverage, .items = table.slots}, queries, table,
                 topk, workspace);
  CheckCounts(counts);
  Ops(stream).average_topk(stream, shape, queries, table, allowed, topk, workspace, counts);
}

void MolLogitTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView workspace, TensorView counts) {
  CheckTable(table);
  CheckQueries(shape, queries);
  CheckAllowed(allowed, queries.components.dim(0), table);
  CheckTopK(topk, queries.components.dim(0) * shape.logits());
  CheckWorkspace(stream, shape, {.op = MolScanOp::kLogits, .items = table.slots}, queries, table,
                 topk, workspace);
  CheckCounts(counts);
  Ops(stream).logit_topk(stream, shape, queries, table, allowed, topk, workspace, counts);
}

void MolLastKeys(Stream& stream, ConstTensorView keys, TensorView last) {
  const int64_t lists = last.dim(0);
  CheckTensor(last, {lists}, DType::kI64, "last keys");
  CheckTensor(keys, {keys.dim(0), keys.dim(1)}, DType::kI64, "keys");
  CHECK(lists > 0 && keys.dim(0) % lists == 0) << keys.dim(0) << " lists of keys";
  Ops(stream).last_keys(stream, keys, last);
}

void MolCandidates(Stream& stream, std::span<const MolStage> stages, int64_t slots,
                   TensorView begin, TensorView candidates, TensorView workspace) {
  const int64_t batch = begin.dim(0) - 1;
  CHECK(batch > 0 && !stages.empty());
  CheckLists(begin, candidates, batch, "candidates");
  int64_t most = 0;
  for (const MolStage& stage : stages) {
    const int64_t lists = stage.last.dim(0);
    CHECK_EQ(lists % batch, 0) << "lists of a stage";
    CheckTopK(stage.found, lists);
    CheckTensor(stage.last, {lists}, DType::kI64, "last keys");
    most += lists / batch * stage.found.keys.dim(1);
  }
  CHECK(candidates.dim(0) >= batch * std::min(slots, most)) << "room for candidates";
  const int64_t bytes = Ops(stream).workspace_bytes(
      stream, {}, {.op = MolScanOp::kCandidates, .batch = batch, .items = slots});
  CHECK(workspace.contiguous() && workspace.bytes() >= bytes)
      << "the workspace has " << workspace.bytes() << " bytes, needs " << bytes;
  Ops(stream).candidates(stream, stages, slots, begin, candidates, workspace);
}

void MolRescore(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView workspace,
                TensorView counts) {
  CheckTable(table);
  CheckQueries(gate.shape, queries);
  CheckLists(candidates_begin, candidates, queries.components.dim(0), "candidates");
  CheckTopK(topk, queries.components.dim(0));
  CheckWorkspace(stream, gate.shape, {.op = MolScanOp::kRescore, .items = candidates.dim(0)},
                 queries, table, topk, workspace);
  CheckCounts(counts);
  Ops(stream).rescore(stream, gate, queries, table, candidates_begin, candidates, topk, workspace,
                      counts);
}

OpCost MolScoreCost(const MolShape& shape, MolStorage storage, int64_t items, int64_t pairs) {
  const double l = static_cast<double>(shape.logits()), h = static_cast<double>(shape.cross_hidden);
  const double dots = 2.0 * l * static_cast<double>(shape.component_dim);
  double gate = h > 0 ? 4.0 * l * h : 2.0 * l * l;
  if (shape.gating == MolGating::kConcatRelu) gate = 2.0 * l * h + 2.0 * h;
  return {(dots + gate) * static_cast<double>(pairs),
          static_cast<double>(MolSlotBytes(shape, storage, false)) * static_cast<double>(items)};
}

}  // namespace trireme
