// Matmuls by cuBLASLt, whose descriptors and choice of an algorithm are made once for each shape
// and used again. Used by one thread.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/dtype.h"

namespace trireme::cuda {

// What a plan is made for: y [rows, n] = x [rows, k] w^T, w [n, k] contiguous and on kPlanAlignment
// bytes. Of e4m3 both have a scale for each row. Rows are exact: an algorithm that is right for
// others need not be for these.
inline constexpr int64_t kPlanAlignment = 256;  // bytes, as Device::Allocate gives them

struct CublasLtShape {
  DType in = DType::kBF16, out = DType::kBF16;  // of x and w; of y and the bias
  int64_t rows = 1, n = 1, k = 1;
  int64_t x_stride = 1, y_stride = 1;    // elements
  int64_t x_alignment = kPlanAlignment;  // bytes; AlignmentOf
  int64_t y_alignment = 1;
  int64_t bias_alignment = 0;  // bytes; 0 = no bias

  auto operator<=>(const CublasLtShape&) const = default;
};

// The largest power of two up to kPlanAlignment that divides the address.
int64_t AlignmentOf(const void* address);

struct CublasLtOperands {
  const void* x = nullptr;
  const void* w = nullptr;
  const float* x_scales = nullptr;  // [rows], of e4m3
  const float* w_scales = nullptr;  // [n], of e4m3
  const void* bias = nullptr;       // [n], or null
  void* y = nullptr;
};

class CublasLtPlans {
 public:
  // What cuBLASLt may use of its own for one matmul, as NVIDIA recommends it for Hopper.
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
  // A model has five shapes for each number of rows, and a plan is about 2 KiB of host memory.
  static constexpr int64_t kCapacity = 2048;

  struct Stats {
    int64_t hits = 0, misses = 0;
    int64_t evicted = 0;  // for a new one, least recently used first
    int64_t refused = 0;  // calls that cuBLASLt has no algorithm for
  };

  // `library` must outlive it.
  explicit CublasLtPlans(const CublasLt& library, int64_t capacity = kCapacity);
  ~CublasLtPlans();

  // Enqueues the matmul; sums in fp32. False, and nothing is enqueued, where cuBLASLt has no
  // algorithm for the shape. `workspace` has kWorkspaceBytes, no other work may use it meanwhile.
  absl::StatusOr<bool> MatMul(cudaStream_t stream, const CublasLtShape& shape,
                              const CublasLtOperands& operands, void* workspace);

  const Stats& stats() const { return stats_; }
  int64_t size() const { return static_cast<int64_t>(plans_.size()); }

 private:
  struct Plan;
  absl::StatusOr<Plan*> Find(const CublasLtShape& shape, const CublasLtOperands& operands);
  absl::Status Make(const CublasLtShape& shape, const CublasLtOperands& operands, Plan* plan) const;
  template <typename T>
  absl::Status Set(cublasLtMatmulDescAttributes_t attribute, const T& value, Plan* plan) const;
  // What of a call's addresses the descriptor holds.
  absl::Status SetAddresses(const CublasLtOperands& operands, Plan* plan) const;
  absl::Status Choose(const CublasLtShape& shape, Plan* plan) const;
  void EvictOne();

  const CublasLt* library_;
  const int64_t capacity_;
  std::map<CublasLtShape, std::unique_ptr<Plan>> plans_;
  int64_t clock_ = 0;
  Stats stats_;
};

}  // namespace trireme::cuda
