#include "kernels/cuda/cublas_lt_plans.h"

#include <algorithm>

#include "kernels/status.h"

namespace trireme::cuda {
namespace {

cudaDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kE4M3:
      return CUDA_R_8F_E4M3;
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// What a create function made, and its destroy function.
template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cublasStatus_t (*)(Handle)>;

}  // namespace

int64_t AlignmentOf(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(kPlanAlignment);
  return static_cast<int64_t>(bits & (~bits + 1));
}

// cuBLASLt counts by columns: y^T [n, rows] = (w as [k, n])^T (x as [k, rows]).
struct CublasLtPlans::Plan {
  explicit Plan(const CublasLt::Functions& f)
      : desc(nullptr, f.desc_destroy),
        w(nullptr, f.layout_destroy),
        x(nullptr, f.layout_destroy),
        y(nullptr, f.layout_destroy) {}

  Owned<cublasLtMatmulDesc_t> desc;
  Owned<cublasLtMatrixLayout_t> w, x, y;
  cublasLtMatmulAlgo_t algorithm{};
  bool supported = false;
  int64_t used_at = 0;
};

CublasLtPlans::CublasLtPlans(const CublasLt& library, int64_t capacity)
    : library_(&library), capacity_(capacity) {}
CublasLtPlans::~CublasLtPlans() = default;

absl::StatusOr<bool> CublasLtPlans::MatMul(cudaStream_t stream, const CublasLtShape& shape,
                                           const CublasLtOperands& operands, void* workspace) {
  ASSIGN_OR_RETURN(Plan* const plan, Find(shape, operands));
  if (!plan->supported) {
    ++stats_.refused;
    return false;
  }
  const CublasLt::Functions& f = library_->functions();
  RETURN_IF_ERROR(SetAddresses(operands, plan));
  const float one = 1.0f, zero = 0.0f;
  RETURN_IF_ERROR(library_->StatusOf(
      f.matmul(library_->handle(), plan->desc.get(), &one, operands.w, plan->w.get(), operands.x,
               plan->x.get(), &zero, operands.y, plan->y.get(), operands.y, plan->y.get(),
               &plan->algorithm, workspace, kWorkspaceBytes, stream),
      "cublasLtMatmul"));
  return true;
}

absl::StatusOr<CublasLtPlans::Plan*> CublasLtPlans::Find(const CublasLtShape& shape,
                                                         const CublasLtOperands& operands) {
  ++clock_;
  if (const auto found = plans_.find(shape); found != plans_.end()) {
    ++stats_.hits;
    found->second->used_at = clock_;
    return found->second.get();
  }
  ++stats_.misses;
  auto plan = std::make_unique<Plan>(library_->functions());
  RETURN_IF_ERROR(Make(shape, operands, plan.get()));
  if (size() >= capacity_) EvictOne();
  plan->used_at = clock_;
  return (plans_[shape] = std::move(plan)).get();
}

template <typename T>
absl::Status CublasLtPlans::Set(cublasLtMatmulDescAttributes_t attribute, const T& value,
                                Plan* plan) const {
  return library_->StatusOf(
      library_->functions().desc_set(plan->desc.get(), attribute, &value, sizeof(value)),
      "cublasLtMatmulDescSetAttribute");
}

absl::Status CublasLtPlans::SetAddresses(const CublasLtOperands& operands, Plan* plan) const {
  if (operands.bias != nullptr)
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias, plan));
  if (operands.x_scales != nullptr) {
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, operands.w_scales, plan));
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, operands.x_scales, plan));
  }
  return absl::OkStatus();
}

absl::Status CublasLtPlans::Make(const CublasLtShape& shape, const CublasLtOperands& operands,
                                 Plan* plan) const {
  const CublasLt::Functions& f = library_->functions();
  const auto layout = [&](DType dtype, int64_t length, int64_t columns, int64_t stride,
                          Owned<cublasLtMatrixLayout_t>* out) {
    cublasLtMatrixLayout_t made = nullptr;
    const cublasStatus_t status =
        f.layout_create(&made, TypeOf(dtype), static_cast<uint64_t>(length),
                        static_cast<uint64_t>(columns), stride);
    out->reset(made);
    return library_->StatusOf(status, "cublasLtMatrixLayoutCreate");
  };
  cublasLtMatmulDesc_t made = nullptr;
  const cublasStatus_t created = f.desc_create(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  plan->desc.reset(made);
  RETURN_IF_ERROR(library_->StatusOf(created, "cublasLtMatmulDescCreate"));
  RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T, plan));
  if (shape.bias_alignment > 0)
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS, plan));
#if TRIREME_CUBLAS_LT_SCALES_ROWS
  if (shape.in == DType::kE4M3) {
    constexpr auto kOfRows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kOfRows, plan));
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kOfRows, plan));
  }
#endif
  // The choice of an algorithm looks at their alignment.
  RETURN_IF_ERROR(SetAddresses(operands, plan));
  RETURN_IF_ERROR(layout(shape.in, shape.k, shape.n, shape.k, &plan->w));
  RETURN_IF_ERROR(layout(shape.in, shape.k, shape.rows, shape.x_stride, &plan->x));
  RETURN_IF_ERROR(layout(shape.out, shape.n, shape.rows, shape.y_stride, &plan->y));
  return Choose(shape, plan);
}

absl::Status CublasLtPlans::Choose(const CublasLtShape& shape, Plan* plan) const {
  const CublasLt::Functions& f = library_->functions();
  cublasLtMatmulPreference_t made = nullptr;
  const cublasStatus_t created = f.preference_create(&made);
  const Owned<cublasLtMatmulPreference_t> preference(made, f.preference_destroy);
  RETURN_IF_ERROR(library_->StatusOf(created, "cublasLtMatmulPreferenceCreate"));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return library_->StatusOf(f.preference_set(preference.get(), attribute, &value, sizeof(value)),
                              "cublasLtMatmulPreferenceSetAttribute");
  };
  RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes}));
  // Parts of a sum over k are added in fp32, in a fixed order; the other schemes round to y's type.
  RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                         uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}));
  RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(shape.x_alignment)));
  const auto y_alignment = static_cast<uint32_t>(shape.y_alignment);
  RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y_alignment));
  RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y_alignment));
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status =
      f.heuristic(library_->handle(), plan->desc.get(), plan->w.get(), plan->x.get(), plan->y.get(),
                  plan->y.get(), preference.get(), 1, &result, &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return absl::OkStatus();
  RETURN_IF_ERROR(library_->StatusOf(status, "cublasLtMatmulAlgoGetHeuristic"));
  plan->supported = found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  plan->algorithm = result.algo;
  return absl::OkStatus();
}

// Graphs do not mind: what they hold of a plan, they hold by value.
void CublasLtPlans::EvictOne() {
  const auto oldest = std::min_element(
      plans_.begin(), plans_.end(),
      [](const auto& a, const auto& b) { return a.second->used_at < b.second->used_at; });
  if (oldest == plans_.end()) return;
  plans_.erase(oldest);
  ++stats_.evicted;
}

}  // namespace trireme::cuda
