// The CUDA backend's MoL ops as the op table wants them, and the gate's weights as its kernels read
// them. Internal to kernels/cuda.
#pragma once

#include <memory>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/mol_op_table.h"

namespace trireme::cuda {

// Units of a hidden layer that a lane works on at a time; their weights lie side by side.
inline constexpr int kMolHiddenTile = 8;
// Of an item's values that lie side by side (MolPiece).
inline constexpr int kMolPieceBytes = 16;
// log2(MolPiece) here.
inline int MolShift(MolStorage storage, int64_t n) {
  const int shift = storage == MolStorage::kF32 ? 2 : storage == MolStorage::kBF16 ? 3 : 4;
  return n % (1 << shift) == 0 ? shift : 0;
}

// f32, [H / 8][L][8] each, filled up with zeros: w1[t][l][i] is W1's row 8 t + i, column l, w2 the
// same of W2's columns. b1 [H, rounded up to 8], b2 [L] (zeros for kConcatRelu). H is L where the
// cross gate is one layer, whose inputs are the logits.
//
// For the tensor cores (where mol_tiles.cuh's TilingOf says so) both layers once more in bf16, with
// columns and units in its order and number: B fragments of mma.m16n8k16 for 32 inputs at a time,
// 16 bytes a lane. w1: [units / 8][columns / 32][32 lanes], w2: [units / 32][columns / 8][32
// lanes].
class CudaMolGate final : public MolGateWeights {
 public:
  Buffer memory, tile_memory;
  const float *w1 = nullptr, *b1 = nullptr, *w2 = nullptr, *b2 = nullptr;
  int64_t hidden_tiles = 0;
  const void *tile_w1 = nullptr, *tile_w2 = nullptr;
  const float *tile_b1 = nullptr, *tile_b2 = nullptr;  // [units], [columns]
};

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

}  // namespace trireme::cuda
