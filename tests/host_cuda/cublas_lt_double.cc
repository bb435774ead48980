#include "tests/host_cuda/cublas_lt_double.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

using trireme::CublasLtDouble;

CublasLtDouble g_double;

void Check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "cublas_lt_double: must hold: %s\n", what);
  std::abort();
}
#define CHECK(condition) Check(condition, #condition)

bool Fails(const char* function, cublasStatus_t* status) {
  if (g_double.failing == nullptr || std::strcmp(g_double.failing, function) != 0) return false;
  *status = static_cast<cublasStatus_t>(g_double.status);
  return true;
}
#define RETURN_IF_FAILING() \
  if (cublasStatus_t status; Fails(__func__, &status)) return status

// What is behind the library's opaque pointers.
struct Desc {
  cublasOperation_t transpose_a = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  int32_t a_scale_mode = 0, b_scale_mode = 0;
  const float *a_scales = nullptr, *b_scales = nullptr;
};
struct Layout {
  cudaDataType type;
  int64_t rows, columns, stride;
  bool operator==(const Layout&) const = default;
};
struct Preference {
  uint64_t workspace_bytes = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
  uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C and D
};
// What the search leaves in the algorithm's opaque words: for what it may be used.
struct Choice {
  Layout a, b, d;
  uint32_t alignment_b, alignment_d, bias_alignment;
};

template <typename T, typename Opaque>
cublasStatus_t Make(Opaque** out, T value) {
  *out = reinterpret_cast<Opaque*>(new T(value));
  ++g_double.alive;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T, typename Opaque>
cublasStatus_t Drop(Opaque* made) {
  delete reinterpret_cast<T*>(made);
  --g_double.alive;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
void Set(T* to, const void* value, size_t bytes) {
  CHECK(bytes == sizeof(T));
  std::memcpy(to, value, bytes);
}

bool Divides(uint32_t alignment, const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignment == 0;
}
uint32_t BiasAlignment(const Desc& desc) {
  if (desc.epilogue != CUBLASLT_EPILOGUE_BIAS) return 0;
  const auto bits = reinterpret_cast<uintptr_t>(desc.bias) | 256u;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

bool HasScales(const Desc& desc) {
  constexpr int32_t kOfRows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  return desc.a_scale_mode == kOfRows && desc.b_scale_mode == kOfRows && desc.a_scales != nullptr &&
         desc.b_scales != nullptr;
}

double At(cudaDataType type, const void* data, int64_t i) {
  if (type == CUDA_R_8F_E4M3)
    return static_cast<double>(static_cast<float>(static_cast<const __nv_fp8_e4m3*>(data)[i]));
  if (type == CUDA_R_16BF) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  if (type == CUDA_R_16F) return __half2float(static_cast<const __half*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
void Store(cudaDataType type, void* data, int64_t i, double value) {
  const auto rounded = static_cast<float>(value);
  if (type == CUDA_R_16BF) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(rounded);
  } else if (type == CUDA_R_16F) {
    static_cast<__half*>(data)[i] = __float2half(rounded);
  } else {
    static_cast<float*>(data)[i] = rounded;
  }
}

// d [n, m] = a^T [k, n] b [k, m] + bias, by columns. A choice of several orders of a sum, as the
// rows ask for other tiles: which one hangs on m, and fp32 makes the difference.
struct Work {
  Desc desc;
  Layout a, b, d;
  const void *a_data, *b_data;
  void *d_data, *workspace;
  size_t workspace_bytes;

  void operator()() const {
    // It is the library's: nobody may count on what was in it.
    std::memset(workspace, 0xA5, workspace_bytes < 4096 ? workspace_bytes : 4096);
    const int64_t parts = b.columns % 3 + 1;
    for (int64_t row = 0; row < d.columns; ++row) {
      for (int64_t column = 0; column < d.rows; ++column) {
        float sum = 0.0f;
        for (int64_t part = 0; part < parts; ++part) {
          float of_part = 0.0f;
          for (int64_t k = part; k < a.rows; k += parts)
            of_part += static_cast<float>(At(a.type, a_data, column * a.stride + k) *
                                          At(b.type, b_data, row * b.stride + k));
          sum += of_part;
        }
        if (a.type == CUDA_R_8F_E4M3) sum *= desc.a_scales[column] * desc.b_scales[row];
        if (desc.epilogue == CUBLASLT_EPILOGUE_BIAS)
          sum += static_cast<float>(At(d.type, desc.bias, column));
        Store(d.type, d_data, row * d.stride + column, sum);
      }
    }
  }
};

}  // namespace

// The algorithm has room for an index only.
static std::vector<Choice>& Choices() {
  static std::vector<Choice> choices;
  return choices;
}

extern "C" {

CublasLtDouble* trireme_cublas_lt_double() { return &g_double; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return "CUBLAS_STATUS_NOT_SUPPORTED";
  if (status == CUBLAS_STATUS_EXECUTION_FAILED) return "CUBLAS_STATUS_EXECUTION_FAILED";
  return "CUBLAS_STATUS_OF_A_TEST";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  RETURN_IF_FAILING();
  return Make(reinterpret_cast<char**>(handle), char{});
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return Drop<char>(reinterpret_cast<char*>(handle));
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  RETURN_IF_FAILING();
  CHECK(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F);
  return Make(desc, Desc{});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return Drop<Desc>(desc); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  RETURN_IF_FAILING();
  auto* const to = reinterpret_cast<Desc*>(desc);
  if (attribute == CUBLASLT_MATMUL_DESC_TRANSA) Set(&to->transpose_a, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_EPILOGUE) Set(&to->epilogue, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_BIAS_POINTER) Set(&to->bias, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_A_SCALE_MODE) Set(&to->a_scale_mode, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_B_SCALE_MODE) Set(&to->b_scale_mode, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) Set(&to->a_scales, value, bytes);
  if (attribute == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER) Set(&to->b_scales, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
  RETURN_IF_FAILING();
  CHECK(stride >= static_cast<int64_t>(rows));
  return Make(layout,
              Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return Drop<Layout>(layout);
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  RETURN_IF_FAILING();
  return Make(preference, Preference{});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return Drop<Preference>(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  RETURN_IF_FAILING();
  auto* const to = reinterpret_cast<Preference*>(preference);
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
    Set(&to->workspace_bytes, value, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) Set(&to->reductions, value, bytes);
  const int matrix = attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
  if (matrix >= 0 && matrix < 4) Set(&to->alignment[matrix], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* found) {
  RETURN_IF_FAILING();
  ++g_double.searches;
  CHECK(handle != nullptr && requested == 1 && c == d);
  *found = 0;
  if (g_double.no_algorithm) return CUBLAS_STATUS_SUCCESS;
  const auto& asked = *reinterpret_cast<const Preference*>(preference);
  CHECK(asked.reductions == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
  CHECK(asked.workspace_bytes > 0);
  CHECK(asked.alignment[2] == asked.alignment[3]);
  // That of A stays at 256.
  CHECK(asked.alignment[0] == 256);
  const Choice choice{*reinterpret_cast<Layout*>(a),
                      *reinterpret_cast<Layout*>(b),
                      *reinterpret_cast<Layout*>(d),
                      asked.alignment[1],
                      asked.alignment[3],
                      BiasAlignment(*reinterpret_cast<Desc*>(desc))};
  CHECK(choice.a.type == choice.b.type);
  if (choice.a.type == CUDA_R_8F_E4M3) {
    // Scales of rows, an alignment of 16 bytes for all, and of the sizes 16.
    CHECK(HasScales(*reinterpret_cast<Desc*>(desc)));
    CHECK(choice.alignment_b >= 16);
    if (choice.a.rows % 16 != 0 || choice.a.columns % 16 != 0 || choice.alignment_d < 16)
      return CUBLAS_STATUS_NOT_SUPPORTED;
  } else {
    // bf16 and fp16 sum to themselves or to fp32.
    CHECK(choice.alignment_b == 256);
    CHECK(choice.d.type == choice.a.type || choice.d.type == CUDA_R_32F);
  }
  Choices().push_back(choice);
  results[0] = {};
  results[0].algo.data[0] = Choices().size();
  results[0].workspaceSize = asked.workspace_bytes;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  RETURN_IF_FAILING();
  ++g_double.matmuls;
  CHECK(handle != nullptr && c == d && c_layout == d_layout);
  CHECK(*static_cast<const float*>(alpha) == 1.0f && *static_cast<const float*>(beta) == 0.0f);
  const Work work{*reinterpret_cast<Desc*>(desc),
                  *reinterpret_cast<Layout*>(a_layout),
                  *reinterpret_cast<Layout*>(b_layout),
                  *reinterpret_cast<Layout*>(d_layout),
                  a,
                  b,
                  d,
                  workspace,
                  workspace_bytes};
  CHECK(work.desc.transpose_a == CUBLAS_OP_T);
  CHECK(work.a.rows == work.b.rows && work.d.rows == work.a.columns);
  CHECK(work.d.columns == work.b.columns);
  // The algorithm was searched for this.
  CHECK(algo->data[0] >= 1 && algo->data[0] <= Choices().size());
  const Choice& choice = Choices()[algo->data[0] - 1];
  CHECK(work.a == choice.a && work.b == choice.b && work.d == choice.d);
  CHECK(Divides(256, a) && Divides(choice.alignment_b, b) && Divides(choice.alignment_d, d));
  CHECK(work.a.type != CUDA_R_8F_E4M3 || HasScales(work.desc));
  CHECK(BiasAlignment(work.desc) >= choice.bias_alignment);
  CHECK((choice.bias_alignment > 0) == (work.desc.epilogue == CUBLASLT_EPILOGUE_BIAS));
  CHECK(workspace != nullptr && Divides(256, workspace) && workspace_bytes > 0);
  if (stream == nullptr) {
    work();
  } else {
    // As host_cuda.h's Recording.
    reinterpret_cast<std::vector<std::function<void()>>*>(stream)->emplace_back(work);
  }
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
