// Body of the isa_*.cc files: all hot loops, then their table. Included once per instruction set.
#include "kernels/cpu/vector-inl.h"
// Builds on the vectors.
#include "kernels/cpu/simd-inl.h"
// These build on both.
#include "kernels/cpu/attention-inl.h"
#include "kernels/cpu/elementwise-inl.h"
#include "kernels/cpu/matmul-inl.h"
#include "kernels/cpu/mol-inl.h"
#include "kernels/cpu/peak-inl.h"

namespace trireme::cpu {

#define TRIREME_STRING_(x) #x
#define TRIREME_STRING(x) TRIREME_STRING_(x)

const IsaKernels& TRIREME_ISA_FACTORY();
const IsaKernels& TRIREME_ISA_FACTORY() {
  namespace isa = TRIREME_ISA;
  static constexpr IsaKernels kKernels = {
      .name = TRIREME_STRING(TRIREME_ISA),
      .native_bf16 = isa::kNativeBf16,
      .norm = isa::NormRows,
      .add_norm = isa::AddNormRows,
      .add = isa::AddRows,
      .gelu = isa::GeluRows,
      .silu_and_mul = isa::SiluAndMulRows,
      .rope_and_store_kv = isa::RopeAndStoreKvRows,
      .to_float = isa::ToFloatRows,
      .matmul_panel = isa::MatMulPanelRows,
      .attention = isa::AttentionRows,
      .mol_logits = isa::MolLogits,
      .mol_above = isa::MolAbove,
      .mol_gate = isa::MolGate,
      .mol_dot = isa::MolDot,
      .silu = isa::SiluRow,
      .l2_normalize = isa::L2NormalizeVector,
      .peak_flops = isa::PeakFlops,
      .read = isa::ReadSum,
  };
  return kKernels;
}

}  // namespace trireme::cpu
