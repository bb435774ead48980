// Linear layers on the CPU: own packed weights and own kernels (matmul-inl.h) instead of oneDNN. A
// general library picks blockings by the number of rows, so a row's bits would depend on the batch;
// and at one row it leaves a third of the memory bandwidth unused. tests/bench/op_bench.cc measures
// both.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/quantize.h"
#include "kernels/status.h"

namespace trireme::cpu {
namespace {

class PackedLinear final : public LinearWeight {
 public:
  Buffer buffer;  // panels; then, of e4m3, what each column's sum of x q / 256 is to be times
  int64_t panel_bytes = 0, panels = 0;

  // kPanelColumns of them; null where the weight has none.
  float* ScalesOf(int64_t panel) const {
    if (dtype != DType::kE4M3) return nullptr;
    char* first = static_cast<char*>(buffer.data()) + panels * panel_bytes;
    return reinterpret_cast<float*>(first) + panel * kPanelColumns;
  }
};

// Columns of y that a panel packed for SwiGLU gives.
constexpr int64_t kSwiGluColumns = kPanelColumns / 2;

// k's of a column that lie side by side.
constexpr int64_t PairOf(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kE4M3 ? 2 : 1;
}

int64_t PaddedK(int64_t k, DType dtype) {
  const int64_t pair = PairOf(dtype);
  return (k + pair - 1) / pair * pair;
}

// One panel of W[N, K] from its rows [columns, K], contiguous: column c of the panel is row c.
template <typename T>
void PackPanel(const T* rows, int64_t columns, int64_t k_end, T* panel) {
  constexpr int64_t kPair = PairOf(kDTypeOf<T>);
  constexpr int64_t kBlock = 32;  // a cache line or two of each of the panel's 64 rows
  for (int64_t k0 = 0; k0 < k_end; k0 += kBlock) {
    for (int64_t c = 0; c < columns; ++c) {
      const T* from = rows + c * k_end;
      for (int64_t k = k0; k < std::min(k_end, k0 + kBlock); ++k) {
        panel[(k / kPair * kPanelColumns + c) * kPair + k % kPair] = from[k];
      }
    }
  }
}

// The rows of W that are panel p's columns. For SwiGLU half of them are gate's, the others the same
// ones of up: whatever I is, one panel has all that its columns of y need.
absl::Status ReadPanel(const LinearWeight& w, int64_t p, TensorView rows, const RowSource& source) {
  if (w.use == LinearUse::kMatMul) return source(p * kPanelColumns, rows);
  const int64_t first = p * kSwiGluColumns, half = rows.dim(0) / 2;
  RETURN_IF_ERROR(source(first, rows.Rows(0, half)));
  return source(w.n / 2 + first, rows.Rows(half, half));
}

// The row of W that is column c of panel p, which has `columns`.
int64_t RowOf(const LinearWeight& w, int64_t p, int64_t columns, int64_t c) {
  if (w.use == LinearUse::kMatMul) return p * kPanelColumns + c;
  const int64_t half = columns / 2, first = p * kSwiGluColumns;
  return c < half ? first + c : w.n / 2 + first + c - half;
}

// Panel p from its rows [columns, K] in float, with `codes` of as many elements to work in.
void QuantizePanel(const PackedLinear& w, int64_t p, const float* rows, int64_t columns,
                   const float* row_maxima, E4M3* codes, E4M3* panel) {
  for (int64_t c = 0; c < columns; ++c) {
    const float* row = rows + c * w.k;
    const float scale = ScaleOfRow(row_maxima != nullptr ? row_maxima[RowOf(w, p, columns, c)]
                                                         : RowMaximum(row, w.k));
    QuantizeRow(row, w.k, scale, codes + c * w.k);
    w.ScalesOf(p)[c] = kKernelScale * scale;
  }
  PackPanel(codes, columns, w.k, panel);
}

// Row `row` of W, whose elements lie a panel's width apart.
template <typename T>
void UnpackRow(const PackedLinear& w, int64_t row, T* out) {
  constexpr int64_t kPair = PairOf(kDTypeOf<T>);
  const T* panel = static_cast<const T*>(w.buffer.data()) +
                   row / kPanelColumns * (w.panel_bytes / static_cast<int64_t>(sizeof(T)));
  const T* from = panel + row % kPanelColumns * kPair;
  for (int64_t k = 0; k < w.k; ++k) out[k] = from[k / kPair * kPair * kPanelColumns + k % kPair];
}

// x as the kernels want it: as it is, or as floats or rounded in memory that lives until the next
// call of this thread.
struct Activations {
  const void* data;
  DType dtype;
  int64_t stride;
};
Activations PrepareActivations(ThreadPool& pool, const ConstTensorView& x, bool rounded) {
  const bool bf16 = x.dtype == DType::kBF16 && BestIsa().native_bf16;
  if (!rounded && (bf16 || x.dtype == DType::kF32)) return {x.data, x.dtype, x.stride0};
  thread_local std::vector<float> converted;
  thread_local std::vector<BF16> converted_bf16;
  const auto elements = static_cast<size_t>(x.elements());
  if (converted.size() < elements) converted.resize(elements);
  if (bf16 && converted_bf16.size() < elements) converted_bf16.resize(elements);
  float* const floats = converted.data();
  BF16* const out = converted_bf16.data();
  const int64_t k = x.dim(1);
  pool.ParallelFor(x.dim(0), RowGrain(k), [&](int64_t begin, int64_t end) {
    BestIsa().to_float(x, floats, begin, end);
    for (int64_t row = begin; rounded && row < end; ++row) {
      float* const values = floats + row * k;
      RoundActivations(values, k);
      // Exact: a code has four bits.
      for (int64_t i = 0; bf16 && i < k; ++i) out[row * k + i] = FromFloat<BF16>(values[i]);
    }
  });
  if (bf16) return {out, DType::kBF16, k};
  return {floats, DType::kF32, k};
}

// Calls run(panel, p, row) for each panel p of W and block of rows from `row` on, on several
// threads: all of `panel` is set but for bias and y.
template <typename Run>
void ForEachPanel(Stream& stream, const ConstTensorView& x, const PackedLinear& w, Run&& run) {
  ThreadPool& pool = PoolOf(stream);
  const int64_t rows = x.dim(0), panels = w.panels;
  if (rows == 0) return;
  const Activations activations = PrepareActivations(pool, x, w.quantizes_activations);
  // Four tasks a thread even out cores of unequal speed; panels are cut by rows only where there
  // are too few of them.
  const int64_t wanted = 4 * pool.threads();
  int64_t block = std::min(rows, kMatMulRows);
  while (panels * ((rows + block - 1) / block) < wanted && block > 24)
    block = std::max<int64_t>(24, block / 12 * 6);
  const int64_t row_blocks = (rows + block - 1) / block, tasks = panels * row_blocks;
  // A task below 5 us is not worth a worker: 200,000 multiply-adds or 100 KB of weights.
  const int64_t task_cost = std::max(w.panel_bytes / 100, w.k * kPanelColumns * block / 200) / 10;
  const int64_t smallest = std::max<int64_t>(1, 100 / std::max<int64_t>(1, task_cost));
  const int64_t grain = std::max(smallest, rows == 1 ? tasks / (2 * wanted) : 1);
  pool.ParallelFor(tasks, grain, [&](int64_t begin, int64_t end) {
    MatMulPanel panel{.x_type = activations.dtype,
                      .x_stride = activations.stride,
                      .weight_type = w.dtype,
                      .k = w.k};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / row_blocks, row = task % row_blocks * block;
      panel.x = static_cast<const char*>(activations.data) +
                row * activations.stride * static_cast<int64_t>(SizeOf(activations.dtype));
      panel.rows = std::min(block, rows - row);
      panel.weights = static_cast<const char*>(w.buffer.data()) + p * w.panel_bytes;
      panel.scales = w.ScalesOf(p);
      panel.columns = std::min(kPanelColumns, w.n - p * kPanelColumns);
      run(panel, p, row);
    }
  });
}

// The vector's elements from `first` on.
ConstTensorView Slice(const ConstTensorView& vector, int64_t first, int64_t count) {
  return {vector.as<char>() + first * SizeOf(vector.dtype), vector.dtype, {count}};
}

}  // namespace

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream& stream, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use,
                                                             const float* row_maxima) {
  auto packed = std::make_unique<PackedLinear>();
  packed->use = use;
  packed->n = n;
  packed->k = k;
  packed->dtype = dtype;
  const bool quantized = dtype == DType::kE4M3;
  const DType source_type = quantized ? DType::kF32 : dtype;
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  packed->panels = panels;
  packed->panel_bytes = PaddedK(k, dtype) * kPanelColumns * static_cast<int64_t>(SizeOf(dtype));
  packed->bytes = panels * packed->panel_bytes;
  if (quantized) packed->bytes += panels * kPanelColumns * static_cast<int64_t>(sizeof(float));
  ASSIGN_OR_RETURN(packed->buffer, stream.device().Allocate(packed->bytes));
  std::mutex mutex;
  absl::Status status;
  PoolOf(stream).ParallelFor(panels, 1, [&](int64_t begin, int64_t end) {
    const int64_t row_bytes = kPanelColumns * k * static_cast<int64_t>(SizeOf(source_type));
    char* rows = static_cast<char*>(Scratch(row_bytes + (quantized ? kPanelColumns * k : 0)));
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = std::min(kPanelColumns, n - p * kPanelColumns);
      const absl::Status read =
          ReadPanel(*packed, p, TensorView(rows, source_type, {columns, k}), source);
      if (!read.ok()) {
        const std::lock_guard<std::mutex> lock(mutex);
        status.Update(read);
        return;
      }
      char* panel = static_cast<char*>(packed->buffer.data()) + p * packed->panel_bytes;
      if (quantized) {
        QuantizePanel(*packed, p, reinterpret_cast<const float*>(rows), columns, row_maxima,
                      reinterpret_cast<E4M3*>(rows + row_bytes), reinterpret_cast<E4M3*>(panel));
        continue;
      }
      DispatchFloat(dtype, [&](auto zero) {
        using T = decltype(zero);
        PackPanel(reinterpret_cast<const T*>(rows), columns, k, reinterpret_cast<T*>(panel));
      });
    }
  });
  RETURN_IF_ERROR(status);
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

namespace {

void MatMulThen(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y, bool gelu) {
  ForEachPanel(stream, x, static_cast<const PackedLinear&>(w),
               [&](MatMulPanel& panel, int64_t p, int64_t row) {
                 const int64_t column = p * kPanelColumns;
                 if (bias) panel.bias = Slice(bias, column, panel.columns);
                 panel.y = y.Rows(row, panel.rows).Columns(column, panel.columns);
                 const int64_t floats = MatMulScratchFloats(panel.rows, w.dtype);
                 BestIsa().matmul_panel(panel,
                                        static_cast<float*>(Scratch(sizeof(float) * floats)));
                 if (gelu) BestIsa().gelu(panel.y, 0, panel.rows);
               });
}

}  // namespace

void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y) {
  MatMulThen(stream, x, w, bias, y, /*gelu=*/false);
}

void MatMulGelu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y) {
  MatMulThen(stream, x, w, bias, y, /*gelu=*/true);
}

void MatMulSwiGlu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                  TensorView y) {
  ForEachPanel(
      stream, x, static_cast<const PackedLinear&>(w),
      [&](MatMulPanel& panel, int64_t p, int64_t row) {
        const int64_t column = p * kSwiGluColumns, half = panel.columns / 2;
        const int64_t elements = panel.rows * kPanelColumns;
        const int64_t sums = MatMulScratchFloats(panel.rows, w.dtype) * int64_t{sizeof(float)};
        const auto size = static_cast<int64_t>(SizeOf(x.dtype));
        // Sums, then gate and up as MatMul would have stored them, then their biases.
        char* scratch = static_cast<char*>(Scratch(sums + elements * size + kPanelColumns * size));
        char* gate_up = scratch + sums;
        char* panel_bias = gate_up + elements * size;
        if (bias) {
          std::memcpy(panel_bias, Slice(bias, column, half).data, half * size);
          std::memcpy(panel_bias + half * size, Slice(bias, w.n / 2 + column, half).data,
                      half * size);
          panel.bias = ConstTensorView(panel_bias, bias.dtype, {panel.columns});
        }
        panel.y = TensorView(gate_up, x.dtype, {panel.rows, panel.columns});
        BestIsa().matmul_panel(panel, reinterpret_cast<float*>(scratch));
        BestIsa().silu_and_mul(panel.y, y.Rows(row, panel.rows).Columns(column, half), 0,
                               panel.rows);
      });
}

}  // namespace trireme::cpu
