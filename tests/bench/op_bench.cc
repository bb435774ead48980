// Ops at the shapes of a 1.2 B parameter Llama (hidden 2048, intermediate 8192, 32 query and 8 kv
// heads of 64, vocabulary 128256, bf16): GB/s and GFLOP/s by the costs of ops.h, and % of what the
// same run measured the machine to be able to.
// --threads N before Google Benchmark's own flags; default: all cores. With oneDNN at hand, its
// matmul too, for contest.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/ceilings.h"
#include "kernels/cpu/isa.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#if defined(TRIREME_BENCH_ONEDNN)
#include <oneapi/dnnl/dnnl.hpp>
#endif

namespace trireme {
namespace {

struct Bench {
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
  CpuCeilings ceilings;
};
Bench* bench = nullptr;

template <typename T>
T Ok(absl::StatusOr<T> result) {
  CHECK(result.ok()) << result.status().ToString();
  return std::move(result).value();
}

// Small values of either sign, so that no matmul overflows or meets denormals.
Tensor Filled(DType dtype, Shape shape) {
  Tensor tensor = Ok(Tensor::Create(*bench->device, dtype, shape));
  const int64_t n = shape.elements();
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(i * 2654435761 % 1021 - 510) / 1024.0f;
    if (dtype == DType::kF32) tensor.view().as<float>()[i] = value;
    if (dtype == DType::kBF16) tensor.view().as<BF16>()[i] = FromFloat<BF16>(value);
    if (dtype == DType::kF16) tensor.view().as<F16>()[i] = FromFloat<F16>(value);
  }
  return tensor;
}

Tensor Integers(const std::vector<int32_t>& values) {
  Tensor tensor =
      Ok(Tensor::Create(*bench->device, DType::kI32, {static_cast<int64_t>(values.size())}));
  std::memcpy(tensor.view().data, values.data(), values.size() * 4);
  return tensor;
}

void Report(benchmark::State& state, const OpCost& cost, DType dtype) {
  const double peak =
      dtype == DType::kBF16 ? bench->ceilings.matmul_flops_bf16 : bench->ceilings.matmul_flops_f32;
  const double runs = static_cast<double>(state.iterations());
  const auto rate = benchmark::Counter::kIsRate;
  state.counters["GB/s"] = benchmark::Counter(cost.bytes * runs / 1e9, rate);
  state.counters["GFLOP/s"] = benchmark::Counter(cost.flops * runs / 1e9, rate);
  state.counters["%read"] =
      benchmark::Counter(100 * cost.bytes * runs / bench->ceilings.read_bytes_per_s, rate);
  state.counters["%peak"] = benchmark::Counter(100 * cost.flops * runs / peak, rate);
}

// As many copies as no cache holds, where the weights are what is moved: a model does not read a
// matrix twice a step.
int64_t Copies(int64_t rows, int64_t weight_bytes) {
  constexpr int64_t kBeyondCaches = int64_t{256} << 20;
  return rows >= 64 || weight_bytes < 100000 ? 1
                                             : std::max<int64_t>(1, kBeyondCaches / weight_bytes);
}

void MatMulBench(benchmark::State& state, DType dtype, int64_t n, int64_t k) {
  const int64_t rows = state.range(0),
                copies = Copies(rows, n * k * static_cast<int64_t>(SizeOf(dtype)));
  const Tensor x = Filled(dtype, {rows, k}), weight = Filled(dtype, {n, k});
  const Tensor y = Ok(Tensor::Create(*bench->device, dtype, {rows, n}));
  std::vector<std::unique_ptr<LinearWeight>> weights;
  for (int64_t i = 0; i < copies; ++i)
    weights.push_back(Ok(PackLinear(*bench->stream, weight.view(), dtype)));
  int64_t next = 0;
  for (auto _ : state) MatMul(*bench->stream, x.view(), *weights[next++ % copies], {}, y.view());
  Report(state, MatMulCost(rows, n, k, dtype, dtype), dtype);
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

void AttentionBench(benchmark::State& state, DType dtype) {
  constexpr int64_t kQHeads = 32, kKvHeads = 8, kHeadDim = 64, kPageSize = 16;
  const int64_t q_len = state.range(0), kv_len = state.range(1), sequences = state.range(2);
  const int64_t pages = (kv_len + kPageSize - 1) / kPageSize;
  const Tensor q = Filled(dtype, {sequences * q_len, kQHeads * kHeadDim});
  const Tensor k = Filled(dtype, {sequences * pages, kPageSize, kKvHeads, kHeadDim});
  const Tensor v = Filled(dtype, {sequences * pages, kPageSize, kKvHeads, kHeadDim});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, q.view().shape));
  std::vector<int32_t> cu = {0}, lens, table;
  for (int64_t s = 0; s < sequences; ++s) {
    cu.push_back(static_cast<int32_t>((s + 1) * q_len));
    lens.push_back(static_cast<int32_t>(kv_len));
    for (int64_t p = 0; p < pages; ++p) table.push_back(static_cast<int32_t>(p * sequences + s));
  }
  const Tensor cu_tensor = Integers(cu), len_tensor = Integers(lens),
               table_tensor = Integers(table);
  const PagedKv kv{k.view(), v.view(),
                   ConstTensorView(table_tensor.view().data, DType::kI32, {sequences, pages})};
  for (auto _ : state) {
    PagedAttention(*bench->stream, q.view(), kv, cu_tensor.view(), len_tensor.view(), {0.125f, 0},
                   out.view());
  }
  OpCost cost = PagedAttentionCost(q_len, kv_len, kQHeads, kKvHeads, kHeadDim, dtype);
  cost.flops *= static_cast<double>(sequences);
  cost.bytes *= static_cast<double>(sequences);
  Report(state, cost, DType::kF32);  // scores and sums are float multiply-adds
}

void RmsNormBench(benchmark::State& state, DType dtype, int64_t hidden) {
  const Tensor x = Filled(dtype, {state.range(0), hidden}), weight = Filled(dtype, {hidden});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {state.range(0), hidden}));
  for (auto _ : state) RmsNorm(*bench->stream, x.view(), weight.view(), 1e-5f, out.view());
  Report(state, RmsNormCost(state.range(0), hidden, dtype), DType::kF32);
}

void SiluBench(benchmark::State& state, DType dtype, int64_t intermediate) {
  const Tensor gate_up = Filled(dtype, {state.range(0), 2 * intermediate});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {state.range(0), intermediate}));
  for (auto _ : state) SiluAndMul(*bench->stream, gate_up.view(), out.view());
  Report(state, SiluAndMulCost(state.range(0), intermediate, dtype), DType::kF32);
}

void RegisterMatMuls() {
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
      if (layer.n > 100000 || layer.n < 100) rows = {1};
      for (int64_t r : rows) {
        benchmark::RegisterBenchmark(("matmul/" + name).c_str(), MatMulBench, dtype, layer.n,
                                     layer.k)
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

void RegisterOthers() {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    const std::string name = Name(dtype);
    benchmark::RegisterBenchmark(("attention/" + name).c_str(), AttentionBench, dtype)
        ->Args({1, 512, 1})
        ->Args({1, 4096, 8})
        ->Args({512, 512, 1})
        ->Args({512, 4096, 1})
        ->UseRealTime();
    benchmark::RegisterBenchmark(("rms_norm/" + name).c_str(), RmsNormBench, dtype, 2048)
        ->Arg(1)
        ->Arg(512)
        ->UseRealTime();
    benchmark::RegisterBenchmark(("rms_norm_tiny/" + name).c_str(), RmsNormBench, dtype, 64)
        ->Arg(1)
        ->UseRealTime();
    benchmark::RegisterBenchmark(("silu_and_mul/" + name).c_str(), SiluBench, dtype, 8192)
        ->Arg(1)
        ->Arg(512)
        ->UseRealTime();
  }
}

int Main(int argc, char** argv) {
  int threads = 0;
  if (argc >= 3 && std::strcmp(argv[1], "--threads") == 0) {
    threads = std::atoi(argv[2]);
    argv[2] = argv[0];
    argc -= 2;
    argv += 2;
  }
  Bench state;
  state.device = Ok(OpenDevice({.name = "cpu", .threads = threads}));
  state.stream = Ok(state.device->NewStream());
  state.ceilings = Ok(MeasureCpuCeilings(*state.stream));
  bench = &state;
  std::printf("%s, %d threads: read %.1f GB/s, f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
              cpu::BestIsa().name, state.device->spec().threads,
              state.ceilings.read_bytes_per_s / 1e9, state.ceilings.matmul_flops_f32 / 1e9,
              state.ceilings.matmul_flops_bf16 / 1e9);
  RegisterMatMuls();
  RegisterOthers();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
