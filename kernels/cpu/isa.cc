#include "kernels/cpu/isa.h"

#include <atomic>
#include <vector>

namespace trireme::cpu {

const IsaKernels& GenericKernels();
#if defined(__x86_64__)
const IsaKernels& Avx2Kernels();
const IsaKernels& Avx512Kernels();
const IsaKernels& Avx512Bf16Kernels();
#endif

namespace {
const std::vector<const IsaKernels*>& Runnable() {
  static const std::vector<const IsaKernels*>* const all = [] {
    auto* list = new std::vector<const IsaKernels*>;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list->push_back(&Avx512Bf16Kernels());
    if (avx512) list->push_back(&Avx512Kernels());
    if (avx2) list->push_back(&Avx2Kernels());
#endif
    list->push_back(&GenericKernels());
    return list;
  }();
  return *all;
}

std::atomic<const IsaKernels*>& InUse() {
  static std::atomic<const IsaKernels*> isa{Runnable().front()};
  return isa;
}
}  // namespace

int64_t MatMulScratchFloats(int64_t rows, DType weight_type) {
  const int64_t expanded =
      weight_type == DType::kE4M3 ? kStretchBytes / static_cast<int64_t>(sizeof(float)) : 0;
  return rows * kPanelColumns + expanded;
}

int64_t AttentionScratchFloats(int64_t head_dim, int64_t rows) {
  const int64_t d = (head_dim + 15) / 16 * 16;
  return 2 * rows * d + 2 * 32 * d + 2 * ((rows + 15) / 16 * 16) + 4 * 32;
}

const IsaKernels& BestIsa() { return *InUse().load(std::memory_order_relaxed); }
int IsaCount() { return static_cast<int>(Runnable().size()); }
const IsaKernels& IsaAt(int i) { return *Runnable()[i]; }
void UseIsa(int i) { InUse().store(Runnable()[i]); }

}  // namespace trireme::cpu
