// Linear layers on the CPU: own packed weights and own kernels (matmul-inl.h) instead of oneDNN. A
// general library picks blockings by the number of rows, so a row's bits would depend on the batch;
// and at one row it leaves a third of the memory bandwidth unused. tests/bench/op_bench.cc measures
// both.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/status.h"

namespace trireme::cpu {
namespace {

class PackedLinear final : public LinearWeight {
 public:
  Buffer buffer;
  int64_t panel_bytes = 0;
};

int64_t PaddedK(int64_t k, DType dtype) { return dtype == DType::kBF16 ? (k + 1) / 2 * 2 : k; }

// One panel of W[N, K], column c of the panel being row c of `weight`.
template <typename From, typename To>
void PackPanel(const ConstTensorView& weight, int64_t first, int64_t columns, To* panel) {
  constexpr int64_t kPair = kDTypeOf<To> == DType::kBF16 ? 2 : 1;
  constexpr int64_t kBlock = 32;  // a cache line or two of each of the panel's 64 rows
  const int64_t k_end = weight.dim(1);
  for (int64_t k0 = 0; k0 < k_end; k0 += kBlock) {
    for (int64_t c = 0; c < columns; ++c) {
      const From* from = weight.row<From>(first + c);
      for (int64_t k = k0; k < std::min(k_end, k0 + kBlock); ++k) {
        To& to = panel[(k / kPair * kPanelColumns + c) * kPair + k % kPair];
        if constexpr (std::is_same_v<From, To>) {
          to = from[k];
        } else {
          to = FromFloat<To>(ToFloat(from[k]));
        }
      }
    }
  }
}

// Row `row` of W, whose elements lie a panel's width apart.
template <typename T>
void UnpackRow(const PackedLinear& w, int64_t row, T* out) {
  constexpr int64_t kPair = kDTypeOf<T> == DType::kBF16 ? 2 : 1;
  const T* panel = static_cast<const T*>(w.buffer.data()) +
                   row / kPanelColumns * (w.panel_bytes / static_cast<int64_t>(sizeof(T)));
  const T* from = panel + row % kPanelColumns * kPair;
  for (int64_t k = 0; k < w.k; ++k) out[k] = from[k / kPair * kPair * kPanelColumns + k % kPair];
}

// x as the kernels want it: as it is, or as floats in memory that lives until the next call of this
// thread.
struct Activations {
  const void* data;
  int64_t stride;
  int64_t element_bytes;
};
Activations PrepareActivations(ThreadPool& pool, const ConstTensorView& x, DType weight_type) {
  const bool native =
      x.dtype == DType::kF32 || (weight_type == DType::kBF16 && BestIsa().native_bf16);
  if (native) return {x.data, x.stride0, static_cast<int64_t>(SizeOf(x.dtype))};
  thread_local std::vector<float> converted;
  if (converted.size() < static_cast<size_t>(x.elements())) converted.resize(x.elements());
  float* floats = converted.data();
  pool.ParallelFor(x.dim(0), RowGrain(x.dim(1)),
                   [&](int64_t begin, int64_t end) { BestIsa().to_float(x, floats, begin, end); });
  return {floats, x.dim(1), sizeof(float)};
}

}  // namespace

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(Stream& stream, ConstTensorView weight,
                                                         DType dtype) {
  auto packed = std::make_unique<PackedLinear>();
  packed->n = weight.dim(0);
  packed->k = weight.dim(1);
  packed->dtype = dtype;
  const int64_t panels = (packed->n + kPanelColumns - 1) / kPanelColumns;
  packed->panel_bytes =
      PaddedK(packed->k, dtype) * kPanelColumns * static_cast<int64_t>(SizeOf(dtype));
  packed->bytes = panels * packed->panel_bytes;
  ASSIGN_OR_RETURN(packed->buffer, stream.device().Allocate(packed->bytes));
  PoolOf(stream).ParallelFor(
      panels, RowGrain(kPanelColumns * packed->k), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          char* panel = static_cast<char*>(packed->buffer.data()) + p * packed->panel_bytes;
          const int64_t columns = std::min(kPanelColumns, packed->n - p * kPanelColumns);
          DispatchFloat(weight.dtype, [&](auto from) {
            DispatchFloat(dtype, [&](auto to) {
              PackPanel<decltype(from)>(weight, p * kPanelColumns, columns,
                                        reinterpret_cast<decltype(to)*>(panel));
            });
          });
        }
      });
  return std::unique_ptr<LinearWeight>(std::move(packed));
}

void Embedding(Stream& stream, ConstTensorView token_ids, const LinearWeight& table,
               int64_t vocab_begin, TensorView out) {
  const PackedLinear& packed = static_cast<const PackedLinear&>(table);
  const int32_t* ids = token_ids.as<int32_t>();
  PoolOf(stream).ParallelFor(out.dim(0), RowGrain(table.k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t id = ids[t] - vocab_begin;
      DispatchFloat(out.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (id < 0 || id >= table.n) {
          std::fill_n(out.row<T>(t), table.k, zero);
        } else {
          UnpackRow(packed, id, out.row<T>(t));
        }
      });
    }
  });
}

void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y) {
  const PackedLinear& packed = static_cast<const PackedLinear&>(w);
  ThreadPool& pool = PoolOf(stream);
  const int64_t rows = x.dim(0), panels = (w.n + kPanelColumns - 1) / kPanelColumns;
  if (rows == 0) return;
  const Activations activations = PrepareActivations(pool, x, w.dtype);
  // Four tasks a thread even out cores of unequal speed; panels are cut by rows only where there
  // are too few of them.
  const int64_t wanted = 4 * pool.threads();
  int64_t block = std::min(rows, kMatMulRows);
  while (panels * ((rows + block - 1) / block) < wanted && block > 24)
    block = std::max<int64_t>(24, block / 12 * 6);
  const int64_t row_blocks = (rows + block - 1) / block, tasks = panels * row_blocks;
  // A task below 5 us is not worth a worker: 200,000 multiply-adds or 100 KB of weights.
  const int64_t task_cost =
      std::max(packed.panel_bytes / 100, w.k * kPanelColumns * block / 200) / 10;
  const int64_t smallest = std::max<int64_t>(1, 100 / std::max<int64_t>(1, task_cost));
  const int64_t grain = std::max(smallest, rows == 1 ? tasks / (2 * wanted) : 1);
  pool.ParallelFor(tasks, grain, [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(Scratch(sizeof(float) * block * kPanelColumns));
    MatMulPanel panel{.x_stride = activations.stride, .weight_type = w.dtype, .k = w.k};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / row_blocks, row = task % row_blocks * block,
                    column = p * kPanelColumns;
      panel.x = static_cast<const char*>(activations.data) +
                row * activations.stride * activations.element_bytes;
      panel.rows = std::min(block, rows - row);
      panel.weights = static_cast<const char*>(packed.buffer.data()) + p * packed.panel_bytes;
      panel.columns = std::min(kPanelColumns, w.n - column);
      if (bias)
        panel.bias = ConstTensorView(bias.as<char>() + column * SizeOf(bias.dtype), bias.dtype,
                                     {panel.columns});
      panel.y = y.Rows(row, panel.rows).Columns(column, panel.columns);
      BestIsa().matmul_panel(panel, scratch);
    }
  });
}

}  // namespace trireme::cpu
