// A random MoL problem in projected form, in doubles and on a device, for tests of the MoL ops.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/mol_ops.h"
#include "tests/reference/mol_reference.h"
#include "tests/testing.h"

namespace trireme {

// A table in device memory whose item i lies in slot i unless told otherwise.
class MolTestTable {
 public:
  MolTestTable(const TestDevice& device, const MolShape& shape, MolStorage storage, int64_t slots,
               bool means)
      : slots_((slots + kMolBlockRows - 1) / kMolBlockRows * kMolBlockRows),
        storage_(storage),
        components_(
            device.Zeros(DType::kF32, {slots_, shape.item_components * shape.component_dim})),
        scales_(device.Zeros(DType::kBF16, {slots_, shape.item_components})),
        gates_(device.Zeros(DType::kF32, {slots_, shape.gate_width()})),
        gate_scales_(device.Zeros(DType::kBF16, {slots_})),
        means_(device.Zeros(DType::kF32, {slots_, shape.component_dim})),
        mean_scales_(device.Zeros(DType::kBF16, {slots_})),
        order_(device.Zeros(DType::kI32, {slots_})),
        with_means_(means) {
    for (int64_t i = 0; i < slots_; ++i) order()[i] = static_cast<uint32_t>(i);
  }
  MolTableView view() {
    return {.storage = storage_,
            .slots = slots_,
            .components = components_.view().data,
            .scales = storage_ == MolStorage::kInt8 ? scales_.view().as<BF16>() : nullptr,
            .gates = gates_.view().data,
            .gate_scales = storage_ == MolStorage::kInt8 ? gate_scales_.view().as<BF16>() : nullptr,
            .means = with_means_ ? means_.view().data : nullptr,
            .mean_scales = storage_ == MolStorage::kInt8 ? mean_scales_.view().as<BF16>() : nullptr,
            .order = order()};
  }
  uint32_t* order() { return order_.view().as<uint32_t>(); }
  int64_t slots() const { return slots_; }

 private:
  int64_t slots_;
  MolStorage storage_;
  Tensor components_, scales_, gates_, gate_scales_, means_, mean_scales_, order_;
  bool with_means_;
};

class MolProblem {
 public:
  MolProblem(const TestDevice& device, const MolShape& shape, int64_t batch, int64_t items,
             uint64_t seed)
      : shape(shape),
        batch(batch),
        items(items),
        query_components(device.Random(
            DType::kF32, {batch, shape.query_components * shape.component_dim}, seed)),
        query_gates(device.Random(DType::kF32, {batch, shape.gate_width()}, seed + 1)),
        item_components(device.Random(
            DType::kF32, {items, shape.item_components * shape.component_dim}, seed + 2)),
        item_gates(device.Random(DType::kF32, {items, shape.gate_width()}, seed + 3)),
        w1(device.Random(DType::kF32, {shape.cross_hidden, shape.logits()}, seed + 4, 0.3)),
        b1(device.Random(DType::kF32, {shape.cross_hidden}, seed + 5, 0.3)),
        w2(device.Random(
            DType::kF32,
            {shape.logits(), shape.cross_hidden > 0 ? shape.cross_hidden : shape.logits()},
            seed + 6, 0.3)),
        b2(device.Random(DType::kF32, {shape.logits()}, seed + 7, 0.3)) {
    L2Normalize(device.stream(), query_components.view(), shape.component_dim, 1e-6f);
    L2Normalize(device.stream(), item_components.view(), shape.component_dim, 1e-6f);
    MolGateTensors tensors{.w1 = w1.view(), .b1 = b1.view(), .w2 = w2.view(), .b2 = b2.view()};
    if (shape.gating == MolGating::kConcatRelu) tensors = {.w2 = w2.view()};
    gate = PackMolGate(device.stream(), shape, tensors).value();
  }

  MolQueries queries(int64_t first = 0, int64_t count = -1) const {
    if (count < 0) count = batch - first;
    return {query_components.view().Rows(first, count), query_gates.view().Rows(first, count)};
  }
  void Store(const TestDevice& device, MolTestTable& table) const {
    std::vector<int32_t> slots(items);
    for (int64_t i = 0; i < items; ++i) slots[i] = static_cast<int32_t>(i);
    MolStore(device.stream(), shape, item_components.view(), item_gates.view(),
             device.From(slots).view(), table.view());
  }
  reference::MolResult Expected() const {
    reference::MolCase mol;
    mol.query_components = shape.query_components;
    mol.item_components = shape.item_components;
    mol.component_dim = shape.component_dim;
    mol.diagonal = shape.pairing == MolPairing::kDiagonal;
    mol.concat_relu = shape.gating == MolGating::kConcatRelu;
    mol.temperature = shape.temperature;
    reference::MolCross cross{.w1 = {}, .b1 = {}, .w2 = ToDoubles(w2.view()), .b2 = {}};
    if (!mol.concat_relu) {
      cross.b2 = ToDoubles(b2.view());
      if (shape.cross_hidden > 0) cross.w1 = ToDoubles(w1.view()), cross.b1 = ToDoubles(b1.view());
    }
    reference::MolResult result;
    result.query_components = ToDoubles(query_components.view());
    result.item_components = ToDoubles(item_components.view());
    result.query_gates = ToDoubles(query_gates.view());
    result.item_gates = ToDoubles(item_gates.view());
    reference::MolScore(mol, cross, batch, items, &result);
    return result;
  }

  MolShape shape;
  int64_t batch, items;
  Tensor query_components, query_gates, item_components, item_gates, w1, b1, w2, b2;
  std::unique_ptr<MolGateWeights> gate;
};

// Masks of one scan, and an answer.
class MolScan {
 public:
  MolScan(const TestDevice& device, int64_t batch, int64_t items, int64_t slots)
      : device_(device), words_(slots / kMolBlockRows), query_mask_(batch, 0) {
    for (int64_t i = 0; i < items; ++i) words_[i / 32] |= int32_t(1u << (i % 32));
  }
  void Forbid(int64_t slot) { words_[slot / 32] &= ~int32_t(1u << (slot % 32)); }
  // Good until the next call.
  MolAllowed allowed(int64_t batch) {
    tensors_.clear();
    MolAllowed allowed;
    allowed.masks =
        ConstTensorView(View(words_).data, DType::kI32, {1, static_cast<int64_t>(words_.size())});
    allowed.query_mask = View({query_mask_.begin(), query_mask_.begin() + batch});
    if (!excluded_begin.empty()) {
      allowed.excluded_begin = View(excluded_begin);
      allowed.excluded = View(excluded);
    }
    return allowed;
  }
  std::vector<int32_t> excluded_begin, excluded;

 private:
  ConstTensorView View(const std::vector<int32_t>& values) {
    tensors_.push_back(device_.From(values));
    return tensors_.back().view();
  }

  const TestDevice& device_;
  std::vector<int32_t> words_;
  std::vector<int32_t> query_mask_;
  std::vector<Tensor> tensors_;
};

class MolAnswer {
 public:
  MolAnswer(const TestDevice& device, int64_t lists, int64_t k)
      : keys_(device.Zeros(DType::kI64, {lists, k})),
        slots_(device.Zeros(DType::kI32, {lists, k})),
        keys(keys_.view().as<uint64_t>(), lists * k),
        slots(slots_.view().as<int32_t>(), lists * k) {}
  MolTopK view() const { return {keys_.view(), slots_.view()}; }
  bool SameKeys(const MolAnswer& other) const {
    return std::equal(keys.begin(), keys.end(), other.keys.begin(), other.keys.end());
  }
  bool operator==(const MolAnswer& other) const {
    return SameKeys(other) &&
           std::equal(slots.begin(), slots.end(), other.slots.begin(), other.slots.end());
  }

 private:
  Tensor keys_, slots_;

 public:
  const std::span<const uint64_t> keys;
  const std::span<const int32_t> slots;
};

// Largest |score| is 1 / T; a logit is a sum of d products of at most 1 in all, the gate's sums
// move the softmax weights by as much again.
inline constexpr float kMolTolerance = 5e-5f;

// Opens the device of the case and selects the instruction set.
class MolOpTest : public ::testing::TestWithParam<DeviceCase> {
 protected:
  MolOpTest() : device_(GetParam()) { cpu::UseIsa(GetParam().isa); }
  ~MolOpTest() override { cpu::UseIsa(0); }
  Stream& stream() { return device_.stream(); }
  MolAnswer Search(const MolProblem& problem, MolTestTable& table, MolScan& scan, int64_t k,
                   bool prune, MolScanCounts* counts = nullptr) {
    MolAnswer answer(device_, problem.batch, k);
    const Tensor counted = device_.Zeros(DType::kI64, {3});
    MolSearch(stream(), *problem.gate, problem.queries(), table.view(), scan.allowed(problem.batch),
              prune, answer.view(),
              Workspace(MolScanOp::kSearch, problem.shape, table, problem.batch, k),
              counts == nullptr ? TensorView() : counted.view());
    if (counts != nullptr) {
      const auto* found = counted.view().as<int64_t>();
      *counts = {.pairs = found[0], .gated = found[1], .not_finite = found[2]};
    }
    return answer;
  }
  // What an op works in: exactly as much as it says, and nothing in it that could pass for a value.
  // Good until the next call. `items`: those of the table unless told otherwise.
  TensorView Workspace(MolScanOp op, const MolShape& shape, MolTestTable& table, int64_t batch,
                       int64_t k, int64_t items = -1) {
    const int64_t bytes = MolWorkspaceBytes(
        stream(), shape, {op, table.view().storage, batch, items < 0 ? table.slots() : items, k});
    workspace_ = device_.Zeros(DType::kU8, {bytes});
    std::fill_n(workspace_.view().as<unsigned char>(), bytes, 0xff);
    return workspace_.view();
  }
  // Scores of all items, by item, from an unpruned search for all of them.
  std::vector<float> Scores(const MolProblem& problem, MolTestTable& table) {
    MolScan scan(device_, problem.batch, problem.items, table.slots());
    const MolAnswer answer = Search(problem, table, scan, problem.items, false);
    std::vector<float> scores(problem.batch * problem.items, NAN);
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t j = 0; j < problem.items; ++j) {
        const int64_t at = b * problem.items + j;
        scores[b * problem.items + answer.slots[at]] = MolKeyScore(answer.keys[at]);
      }
    }
    return scores;
  }
  // The scores of problems of these shapes, each with a seed of its own, are the twin's.
  void ExpectTwins(std::span<const MolShape> shapes, int64_t batch, int64_t items, uint64_t seed) {
    for (const MolShape& shape : shapes) {
      const MolProblem problem(device_, shape, batch, items, seed += 10);
      MolTestTable table(device_, shape, MolStorage::kF32, items, false);
      problem.Store(device_, table);
      const std::vector<double> expected = problem.Expected().scores;
      const std::vector<float> scores = Scores(problem, table);
      ASSERT_EQ(scores.size(), expected.size());
      for (size_t i = 0; i < scores.size(); ++i) {
        ASSERT_NEAR(scores[i], expected[i], kMolTolerance)
            << "pair " << i << " of " << shape.query_components << "x" << shape.item_components
            << "x" << shape.component_dim;
      }
    }
  }
  TestDevice device_;

 private:
  Tensor workspace_;
};

inline MolShape Shape(int64_t pq, int64_t px, int64_t d, int64_t h, float temperature = 0.05f) {
  return {.query_components = pq,
          .item_components = px,
          .component_dim = d,
          .cross_hidden = h,
          .temperature = temperature};
}
inline MolShape Diagonal(MolShape shape) {
  shape.pairing = MolPairing::kDiagonal;
  return shape;
}
inline MolShape Concat(MolShape shape) {
  shape.gating = MolGating::kConcatRelu;
  return shape;
}

inline std::string MolDeviceName(const ::testing::TestParamInfo<DeviceCase>& info) {
  return info.param.name;
}

}  // namespace trireme
