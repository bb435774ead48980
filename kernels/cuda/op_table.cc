#include "kernels/cuda/cuda_ops.h"

namespace trireme::cuda {

const OpTable kOps = {
    .embedding = Embedding,
    .rms_norm = RmsNorm,
    .add_rms_norm = AddRmsNorm,
    .add = Add,
    .matmul = MatMul,
    .rope_and_store_kv = RopeAndStoreKv,
    .paged_attention = PagedAttention,
    .silu_and_mul = SiluAndMul,
    .gather_rows = GatherRows,
    .pack_linear = PackLinearFrom,
};

}  // namespace trireme::cuda
