// Matmuls of a linear layer: of every storage, with SwiGLU or GELU behind them, and who else
// computes them. With oneDNN at hand its matmul too, for contest; on a GPU cuBLASLt's, with its
// copy of x. %peak is of the activations' type throughout: tensor cores that multiply codes
// (matmul_e4m3_dynamic by cuBLASLt) can be twice as fast.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "tests/bench/op_bench.h"
#if defined(TRIREME_BENCH_ONEDNN)
#include <oneapi/dnnl/dnnl.hpp>
#endif

namespace trireme {
namespace {

// As many copies as no cache holds, where the weights are what is moved: a model does not read a
// matrix twice a step.
int64_t Copies(int64_t rows, int64_t weight_bytes) {
  constexpr int64_t kBeyondCaches = int64_t{256} << 20;
  return rows >= 64 || weight_bytes < 100000 ? 1
                                             : std::max<int64_t>(1, kBeyondCaches / weight_bytes);
}

// Who computes a matmul: the backend's kernels, or without room for parts, so that no blocks share
// a sum; or cuBLASLt with the same weights.
enum class By : uint8_t { kOwn, kOwnUnshared, kCublasLt };

Stream& StreamOf(By by, const std::vector<std::unique_ptr<LinearWeight>>& weights, int64_t rows) {
  if (by == By::kOwnUnshared) return *bench->no_room;
  Stream& stream = by == By::kOwn ? *bench->stream : *bench->cublas_lt;
  Ok(ReserveMatMul(stream, rows, {weights[0].get()}));
  return stream;
}

// How weights are kept, and what they are multiplied with.
struct Storage {
  DType dtype = DType::kBF16;
  bool quantizes_activations = false;
};

void MatMulBench(benchmark::State& state, DType dtype, Storage stored, int64_t n, int64_t k,
                 By by) {
  const int64_t rows = state.range(0),
                copies = Copies(rows, n * k * static_cast<int64_t>(SizeOf(stored.dtype)));
  const Tensor x = Filled(dtype, {rows, k});
  const std::vector<char> weight = FillHost(dtype, n * k);
  const Tensor y = Ok(Tensor::Create(*bench->device, dtype, {rows, n}));
  std::vector<std::unique_ptr<LinearWeight>> weights;
  for (int64_t i = 0; i < copies; ++i) {
    weights.push_back(Ok(
        PackLinear(*bench->stream, ConstTensorView(weight.data(), dtype, {n, k}), stored.dtype)));
    weights.back()->quantizes_activations = stored.quantizes_activations;
  }
  Stream& stream = StreamOf(by, weights, rows);
  int64_t next = 0;
  Measure(state, stream,
          [&] { MatMul(stream, x.view(), *weights[next++ % copies], {}, y.view()); });
  Report(state, MatMulCost(rows, n, k, dtype, stored.dtype), dtype);
}

// Gate and up of [2 I, K] with SwiGLU; unfused, the two ops that it replaces.
void SwiGluBench(benchmark::State& state, DType dtype, bool fused, By by) {
  constexpr int64_t kIntermediate = 8192, kK = 2048;
  const int64_t rows = state.range(0),
                copies = Copies(rows, 2 * kIntermediate * kK * static_cast<int64_t>(SizeOf(dtype)));
  const Tensor x = Filled(dtype, {rows, kK});
  const std::vector<char> weight = FillHost(dtype, 2 * kIntermediate * kK);
  const Tensor gate_up = Ok(Tensor::Create(*bench->device, dtype, {rows, 2 * kIntermediate}));
  const Tensor y = Ok(Tensor::Create(*bench->device, dtype, {rows, kIntermediate}));
  std::vector<std::unique_ptr<LinearWeight>> weights;
  for (int64_t i = 0; i < copies; ++i) {
    weights.push_back(Ok(PackLinear(*bench->stream,
                                    ConstTensorView(weight.data(), dtype, {2 * kIntermediate, kK}),
                                    dtype, fused ? LinearUse::kMatMulSwiGlu : LinearUse::kMatMul)));
  }
  Stream& stream = StreamOf(by, weights, rows);
  int64_t next = 0;
  Measure(state, stream, [&] {
    const LinearWeight& w = *weights[next++ % copies];
    if (fused) return MatMulSwiGlu(stream, x.view(), w, {}, y.view());
    MatMul(stream, x.view(), w, {}, gate_up.view());
    SiluAndMul(stream, gate_up.view(), y.view());
  });
  Report(state, MatMulSwiGluCost(rows, kIntermediate, kK, dtype, dtype), dtype);
}

// The MLP without a gate of the same width; unfused, the two ops that it replaces.
void MatMulGeluBench(benchmark::State& state, DType dtype, bool fused) {
  constexpr int64_t kIntermediate = 8192, kK = 2048;
  const int64_t rows = state.range(0),
                copies = Copies(rows, kIntermediate * kK * static_cast<int64_t>(SizeOf(dtype)));
  const Tensor x = Filled(dtype, {rows, kK});
  const std::vector<char> weight = FillHost(dtype, kIntermediate * kK);
  const Tensor y = Ok(Tensor::Create(*bench->device, dtype, {rows, kIntermediate}));
  std::vector<std::unique_ptr<LinearWeight>> weights;
  for (int64_t i = 0; i < copies; ++i) {
    weights.push_back(Ok(PackLinear(
        *bench->stream, ConstTensorView(weight.data(), dtype, {kIntermediate, kK}), dtype)));
  }
  Stream& stream = StreamOf(By::kOwn, weights, rows);
  int64_t next = 0;
  Measure(state, stream, [&] {
    const LinearWeight& w = *weights[next++ % copies];
    if (fused) return MatMulGelu(stream, x.view(), w, {}, y.view());
    MatMul(stream, x.view(), w, {}, y.view());
    Gelu(stream, y.view());
  });
  Report(state, MatMulGeluCost(rows, kIntermediate, kK, dtype, dtype), dtype);
}

#if defined(TRIREME_BENCH_ONEDNN)
void OneDnnBench(benchmark::State& state, DType dtype, int64_t n, int64_t k) {
  using dnnl::memory;
  const int64_t rows = state.range(0),
                copies = Copies(rows, n * k * static_cast<int64_t>(SizeOf(dtype)));
  const auto type = dtype == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc x_desc({rows, k}, type, memory::format_tag::ab),
      y_desc({rows, n}, type, memory::format_tag::ab);
  const memory::desc w_desc({k, n}, type, memory::format_tag::any);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc desc(engine, x_desc, w_desc, y_desc);
#else
  const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(x_desc, w_desc, y_desc), engine);
#endif
  const dnnl::matmul matmul(desc);
  const Tensor x = Filled(dtype, {rows, k}), weight = Filled(dtype, {n, k});
  const Tensor y = Ok(Tensor::Create(*bench->device, dtype, {rows, n}));
  memory plain({{k, n}, type, memory::format_tag::ba}, engine, weight.view().data);
  std::vector<Tensor> storage;
  std::vector<memory> weights;
  for (int64_t i = 0; i < copies; ++i) {
    storage.push_back(Ok(Tensor::Create(*bench->device, DType::kU8,
                                        {static_cast<int64_t>(desc.weights_desc().get_size())})));
    weights.emplace_back(desc.weights_desc(), engine, storage.back().view().data);
    dnnl::reorder(plain, weights.back()).execute(stream, plain, weights.back());
  }
  memory x_memory(x_desc, engine, x.view().data), y_memory(y_desc, engine, y.view().data);
  int64_t next = 0;
  for (auto _ : state) {
    matmul.execute(stream, {{DNNL_ARG_SRC, x_memory},
                            {DNNL_ARG_WEIGHTS, weights[next++ % copies]},
                            {DNNL_ARG_DST, y_memory}});
    stream.wait();
  }
  Report(state, MatMulCost(rows, n, k, dtype, dtype), dtype);
}
#endif

void RegisterPlainMatMuls() {
  struct Layer {
    const char* name;
    int64_t n, k;
  };
  const Layer layers[] = {{"qkv", 3072, 2048},  {"o", 2048, 2048},      {"gate_up", 16384, 2048},
                          {"down", 2048, 8192}, {"head", 128256, 2048}, {"tiny", 64, 64}};
  for (DType dtype : {DType::kBF16, DType::kF32, DType::kF16}) {
    for (const Layer& layer : layers) {
      if (dtype == DType::kF16 && std::string(layer.name) != "qkv") continue;
      const std::string name = std::string(layer.name) + "/" + Name(dtype);
      std::vector<int64_t> rows = {1, 4, 16, 64, 512};
      if (!bench->device->spec().host_memory) rows.push_back(4096);  // a prompt's
      if (layer.n > 100000 || layer.n < 100) rows = {1};
      for (int64_t r : rows) {
        benchmark::RegisterBenchmark(("matmul/" + name).c_str(), MatMulBench, dtype, Storage{dtype},
                                     layer.n, layer.k, By::kOwn)
            ->Arg(r)
            ->UseRealTime();
        if (bench->no_room != nullptr && dtype != DType::kF32 && r == 64) {
          benchmark::RegisterBenchmark(("matmul_unshared/" + name).c_str(), MatMulBench, dtype,
                                       Storage{dtype}, layer.n, layer.k, By::kOwnUnshared)
              ->Arg(r)
              ->UseRealTime();
        }
        if (bench->cublas_lt != nullptr && dtype != DType::kF32 && r >= 64) {
          benchmark::RegisterBenchmark(("matmul_cublaslt/" + name).c_str(), MatMulBench, dtype,
                                       Storage{dtype}, layer.n, layer.k, By::kCublasLt)
              ->Arg(r)
              ->UseRealTime();
        }
        // A GPU's kernel for both is the same one.
        if (dtype == DType::kF32 && !bench->device->spec().host_memory) continue;
        benchmark::RegisterBenchmark(("matmul_e4m3/" + name).c_str(), MatMulBench, dtype,
                                     Storage{DType::kE4M3}, layer.n, layer.k, By::kOwn)
            ->Arg(r)
            ->UseRealTime();
#if defined(TRIREME_BENCH_ONEDNN)
        if (dtype == DType::kF16) continue;
        benchmark::RegisterBenchmark(("onednn/" + name).c_str(), OneDnnBench, dtype, layer.n,
                                     layer.k)
            ->Arg(r)
            ->UseRealTime();
#endif
      }
    }
  }
}

// The widest and the longest layer with codes of activations: making them is part of the op. Its
// twin is matmul_e4m3 of the same name, which reads the same weights and rounds nothing.
void RegisterDynamicMatMuls() {
  constexpr Storage kCodes{DType::kE4M3, /*quantizes_activations=*/true};
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    if (dtype == DType::kF32 && !bench->device->spec().host_memory) continue;
    for (const auto& [layer, n, k] : {std::tuple("gate_up", 16384, 2048), {"down", 2048, 8192}}) {
      const std::string name = std::string(layer) + "/" + Name(dtype);
      std::vector<int64_t> rows = {1, 16, 64, 512};
      if (!bench->device->spec().host_memory) rows.push_back(4096);
      for (const int64_t r : rows) {
        benchmark::RegisterBenchmark(("matmul_e4m3_dynamic/" + name).c_str(), MatMulBench, dtype,
                                     kCodes, n, k, By::kOwn)
            ->Arg(r)
            ->UseRealTime();
        if (bench->cublas_lt == nullptr || r < 64) continue;
        benchmark::RegisterBenchmark(("matmul_e4m3_dynamic_cublaslt/" + name).c_str(), MatMulBench,
                                     dtype, kCodes, n, k, By::kCublasLt)
            ->Arg(r)
            ->UseRealTime();
      }
    }
  }
}

void RegisterMlps() {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const bool fused : {true, false}) {
      const std::string name = fused ? "matmul_swiglu/" : "matmul_swiglu_unfused/";
      benchmark::RegisterBenchmark((name + Name(dtype)).c_str(), SwiGluBench, dtype, fused,
                                   By::kOwn)
          ->Arg(1)
          ->Arg(16)
          ->Arg(512)
          ->UseRealTime();
    }
    for (const bool fused : {true, false}) {
      const std::string name = fused ? "matmul_gelu/" : "matmul_gelu_unfused/";
      benchmark::RegisterBenchmark((name + Name(dtype)).c_str(), MatMulGeluBench, dtype, fused)
          ->Arg(1)
          ->Arg(16)
          ->Arg(512)
          ->UseRealTime();
    }
    if (bench->cublas_lt == nullptr || dtype == DType::kF32) continue;
    const std::string name = std::string("matmul_swiglu_cublaslt/") + Name(dtype);
    benchmark::RegisterBenchmark(name.c_str(), SwiGluBench, dtype, /*fused=*/true, By::kCublasLt)
        ->Arg(512)
        ->UseRealTime();
  }
}

}  // namespace

void RegisterMatMuls() {
  RegisterPlainMatMuls();
  RegisterDynamicMatMuls();
  RegisterMlps();
}

}  // namespace trireme
