#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/mol_ops.h"

namespace trireme::cuda {

const MolOpTable kMolOps = {
    .pack_gate = PackMolGate,
    .silu = Silu,
    .gelu_and_mul = GeluAndMul,
    .l2_normalize = L2Normalize,
    .store = MolStore,
    .workspace_bytes = MolWorkspaceBytes,
    .search = MolSearch,
    .average_topk = MolAverageTopK,
    .logit_topk = MolLogitTopK,
    .last_keys = MolLastKeys,
    .candidates = MolCandidates,
    .rescore = MolRescore,
    .piece_bytes = kMolPieceBytes,
};

const OpTable kOps = {
    .embedding = Embedding,
    .norm = Norm,
    .add_norm = AddNorm,
    .add = Add,
    .matmul = MatMul,
    .matmul_swiglu = MatMulSwiGlu,
    .matmul_gelu = MatMulGelu,
    .reserve_matmul = ReserveMatMul,
    .rope_and_store_kv = RopeAndStoreKv,
    .paged_attention = PagedAttention,
    .attention_workspace_bytes = AttentionWorkspaceBytes,
    .gelu = Gelu,
    .silu_and_mul = SiluAndMul,
    .gather_rows = GatherRows,
    .penalize_logits = PenalizeLogits,
    .summarize_logits = SummarizeLogits,
    .draw_tokens = DrawTokens,
    .restore_logits = RestoreLogits,
    .choose_tokens = ChooseTokens,
    .pack_linear = PackLinearFrom,
    .mol = &kMolOps,
};

}  // namespace trireme::cuda
