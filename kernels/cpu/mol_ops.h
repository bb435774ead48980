// The CPU backend's MoL ops as the op table wants them. Internal to kernels/cpu.
#pragma once

#include <memory>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/mol_op_table.h"

namespace trireme::cpu {

class PackedMolGate final : public MolGateWeights {
 public:
  std::vector<float> hidden_weights, hidden_bias, output_weights, output_bias;
  MolGateLayer hidden() const {
    return {hidden_weights.data(), hidden_bias.data(), shape.logits(), hidden_outputs};
  }
  MolGateLayer output() const {
    return {output_weights.data(), output_bias.data(), output_inputs, shape.logits()};
  }
  int64_t hidden_outputs = 0, output_inputs = 0;
};

// A table's block as the hot loops see it.
inline MolElement ElementOf(MolStorage storage) {
  return storage == MolStorage::kF32    ? MolElement::kF32
         : storage == MolStorage::kBF16 ? MolElement::kBF16
                                        : MolElement::kInt8;
}
inline int64_t ElementBytes(MolStorage storage) {
  return storage == MolStorage::kF32 ? 4 : storage == MolStorage::kBF16 ? 2 : 1;
}

absl::StatusOr<std::unique_ptr<MolGateWeights>> PackMolGate(Stream&, const MolShape& shape,
                                                            const MolGateTensors& tensors);
void Silu(Stream&, TensorView x);
void GeluAndMul(Stream&, ConstTensorView gate_up, TensorView out);
void L2Normalize(Stream&, TensorView x, int64_t dim, float eps);
void MolStore(Stream&, const MolShape& shape, ConstTensorView components, ConstTensorView gates,
              ConstTensorView slots, const MolTableView& table);
int64_t MolWorkspaceBytes(const Stream&, const MolShape& shape, const MolScanSize& size);
void MolSearch(Stream&, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView workspace, TensorView counts);
void MolAverageTopK(Stream&, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView workspace, TensorView counts);
void MolLogitTopK(Stream&, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView workspace, TensorView counts);
void MolLastKeys(Stream&, ConstTensorView keys, TensorView last);
void MolCandidates(Stream&, std::span<const MolStage> stages, int64_t slots, TensorView begin,
                   TensorView candidates, TensorView workspace);
void MolRescore(Stream&, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView workspace,
                TensorView counts);

}  // namespace trireme::cpu
