// Ops at the shapes of a 1.2 B parameter Llama (hidden 2048, intermediate 8192, 32 query and 8 kv
// heads of 64, vocabulary 128256, bf16): GB/s and GFLOP/s by the costs of ops.h, and % of what the
// same run measured the machine to be able to.
// --device cpu|cuda and --threads N before Google Benchmark's own flags; default: the CPU with all
// cores.
#include "tests/bench/op_bench.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/isa.h"
#include "kernels/mol_ops.h"
#include "kernels/status.h"

namespace trireme {

Bench* bench = nullptr;

std::vector<char> FillHost(DType dtype, int64_t n) {
  constexpr int64_t kPeriod = 1021;
  std::vector<char> bytes(static_cast<size_t>(n) * SizeOf(dtype));
  for (int64_t i = 0; i < std::min(n, kPeriod); ++i) {
    const float value = static_cast<float>(i * 2654435761 % kPeriod - 510) / 1024.0f;
    if (dtype == DType::kF32) reinterpret_cast<float*>(bytes.data())[i] = value;
    if (dtype == DType::kBF16) reinterpret_cast<BF16*>(bytes.data())[i] = FromFloat<BF16>(value);
    if (dtype == DType::kF16) reinterpret_cast<F16*>(bytes.data())[i] = FromFloat<F16>(value);
  }
  // Copies of what there is: a gigabyte of keys is made faster than it is read.
  for (int64_t filled = kPeriod; filled < n;) {
    const int64_t more = std::min(filled, n - filled);
    std::memcpy(bytes.data() + filled * static_cast<int64_t>(SizeOf(dtype)), bytes.data(),
                static_cast<size_t>(more) * SizeOf(dtype));
    filled += more;
  }
  return bytes;
}

Tensor Upload(DType dtype, Shape shape, const void* data) {
  Tensor tensor = Ok(Tensor::Create(*bench->device, dtype, shape));
  bench->stream->Copy(tensor.view().data, data, static_cast<size_t>(tensor.view().bytes()));
  CHECK(bench->stream->Synchronize().ok());
  return tensor;
}
Tensor Filled(DType dtype, Shape shape) {
  return Upload(dtype, shape, FillHost(dtype, shape.elements()).data());
}
Tensor Integers(const std::vector<int32_t>& values) {
  return Upload(DType::kI32, {static_cast<int64_t>(values.size())}, values.data());
}

void Report(benchmark::State& state, const OpCost& cost, DType dtype) {
  const double peak = bench->ceilings.MatMulFlops(dtype);
  const double runs = static_cast<double>(state.iterations());
  const auto rate = benchmark::Counter::kIsRate;
  state.counters["GB/s"] = benchmark::Counter(cost.bytes * runs / 1e9, rate);
  state.counters["GFLOP/s"] = benchmark::Counter(cost.flops * runs / 1e9, rate);
  state.counters["%read"] =
      benchmark::Counter(100 * cost.bytes * runs / bench->ceilings.read_bytes_per_s, rate);
  state.counters["%peak"] = benchmark::Counter(100 * cost.flops * runs / peak, rate);
}

namespace {

void AttentionBench(benchmark::State& state, DType dtype, int64_t q_heads) {
  constexpr int64_t kKvHeads = 8, kPageSize = 16;
  const int64_t q_len = state.range(0), kv_len = state.range(1), sequences = state.range(2),
                head_dim = state.range(3);
  const int64_t pages = (kv_len + kPageSize - 1) / kPageSize;
  const Tensor q = Filled(dtype, {sequences * q_len, q_heads * head_dim});
  const Tensor k = Filled(dtype, {sequences * pages, kPageSize, kKvHeads, head_dim});
  const Tensor v = Filled(dtype, {sequences * pages, kPageSize, kKvHeads, head_dim});
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
  AttentionShape shape{.scale = 0.125f, .min_q_len = q_len, .max_q_len = q_len};
  const int64_t bytes = AttentionWorkspaceBytes(*bench->stream, {.dtype = dtype,
                                                                 .sequences = sequences,
                                                                 .q_heads = q_heads,
                                                                 .kv_heads = kKvHeads,
                                                                 .head_dim = head_dim,
                                                                 .max_kv_len = pages * kPageSize});
  Tensor workspace;
  if (bytes > 0) workspace = Ok(Tensor::Create(*bench->device, DType::kU8, {bytes}));
  shape.workspace = workspace.view();
  Measure(state, [&] {
    PagedAttention(*bench->stream, q.view(), kv, cu_tensor.view(), len_tensor.view(), shape,
                   out.view());
  });
  OpCost cost = PagedAttentionCost(q_len, kv_len, q_heads, kKvHeads, head_dim, dtype);
  cost.flops *= static_cast<double>(sequences);
  cost.bytes *= static_cast<double>(sequences);
  // On the CPU scores and sums are float multiply-adds, whatever the type.
  Report(state, cost, bench->device->spec().host_memory ? DType::kF32 : dtype);
}

// Exact search for the 100 best: every pair goes through the gate. 8x4 components of 64.
void MolSearchBench(benchmark::State& state, MolStorage storage) {
  const MolShape shape{.query_components = 8,
                       .item_components = 4,
                       .component_dim = 64,
                       .cross_hidden = 128,
                       .temperature = 0.05f};
  constexpr int64_t kChunk = 1 << 14, kBest = 100;
  const int64_t items = state.range(0), batch = state.range(1), logits = shape.logits();
  Stream& stream = *bench->stream;
  const std::vector<char> weights = FillHost(DType::kF32, shape.cross_hidden * logits);
  const auto host = [&](Shape dims) { return ConstTensorView(weights.data(), DType::kF32, dims); };
  const auto gate = Ok(PackMolGate(stream, shape,
                                   {.w1 = host({shape.cross_hidden, logits}),
                                    .b1 = host({shape.cross_hidden}),
                                    .w2 = host({logits, shape.cross_hidden}),
                                    .b2 = host({logits})}));
  const Tensor queries = Filled(DType::kF32, {batch, 8 * 64});
  const Tensor rows = Filled(DType::kF32, {kChunk, 4 * 64});
  L2Normalize(stream, queries.view(), 64, 1e-6f);
  L2Normalize(stream, rows.view(), 64, 1e-6f);
  const Tensor query_gates = Filled(DType::kF32, {batch, logits});
  const Tensor row_gates = Filled(DType::kF32, {kChunk, logits});
  // Bytes enough for any storage.
  const Tensor components = Ok(Tensor::Create(*bench->device, DType::kF32, {items, 4 * 64}));
  const Tensor scales = Ok(Tensor::Create(*bench->device, DType::kBF16, {items, 4}));
  const Tensor gates = Ok(Tensor::Create(*bench->device, DType::kF32, {items, logits}));
  const Tensor gate_scales = Ok(Tensor::Create(*bench->device, DType::kBF16, {items}));
  std::vector<int32_t> numbers(items);
  for (int64_t i = 0; i < items; ++i) numbers[i] = static_cast<int32_t>(i);
  const Tensor order = Integers(numbers);
  const MolTableView table{.storage = storage,
                           .slots = items,
                           .components = components.view().data,
                           .scales = scales.view().as<BF16>(),
                           .gates = gates.view().data,
                           .gate_scales = gate_scales.view().as<BF16>(),
                           .order = order.view().as<uint32_t>()};
  for (int64_t i = 0; i < items; i += kChunk) {
    MolStore(stream, shape, rows.view(), row_gates.view(), order.view().Rows(i, kChunk), table);
  }
  const Tensor masks = Integers(std::vector<int32_t>(items / kMolBlockRows, -1));
  const Tensor query_mask = Integers(std::vector<int32_t>(batch, 0));
  MolAllowed allowed;
  allowed.masks = ConstTensorView(masks.view().data, DType::kI32, {1, items / kMolBlockRows});
  allowed.query_mask = query_mask.view();
  const Tensor keys = Ok(Tensor::Create(*bench->device, DType::kI64, {batch, kBest}));
  const Tensor slots = Ok(Tensor::Create(*bench->device, DType::kI32, {batch, kBest}));
  const Tensor workspace = Ok(Tensor::Create(
      *bench->device, DType::kU8,
      {MolWorkspaceBytes(stream, shape, {MolScanOp::kSearch, storage, batch, items, kBest})}));
  Measure(state, [&] {
    MolSearch(stream, *gate, {queries.view(), query_gates.view()}, table, allowed, /*prune=*/false,
              {keys.view(), slots.view()}, workspace.view(), {});
  });
  // On the CPU all arithmetic is f32.
  const bool f32 = bench->device->spec().host_memory || storage == MolStorage::kF32;
  Report(state, MolScoreCost(shape, storage, items, items * batch),
         f32 ? DType::kF32 : DType::kBF16);
}

void RegisterMolSearch() {
  const int64_t items = bench->device->spec().host_memory ? 1 << 15 : 1 << 20;
  for (const auto& [name, storage] : {std::pair{"f32", MolStorage::kF32},
                                      {"bf16", MolStorage::kBF16},
                                      {"int8", MolStorage::kInt8}}) {
    benchmark::RegisterBenchmark((std::string("mol_search/") + name).c_str(), MolSearchBench,
                                 storage)
        ->Args({items, 1})
        ->Args({items, 8})
        ->Args({items, 32})
        ->UseRealTime();
  }
}

void RegisterAttention() {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    const std::string name = Name(dtype);
    benchmark::RegisterBenchmark(("attention/" + name).c_str(), AttentionBench, dtype, 32)
        ->Args({1, 512, 1, 64})
        ->Args({1, 4096, 8, 64})
        ->Args({512, 512, 1, 64})
        ->Args({512, 4096, 1, 64})
        ->UseRealTime();
    // In f32 one kernel serves all sizes, without tensor cores: it would take minutes.
    if (!bench->device->spec().host_memory && dtype == DType::kBF16) {
      benchmark::RegisterBenchmark(("attention/" + name).c_str(), AttentionBench, dtype, 32)
          ->Args({1, 8192, 64, 128})
          ->Args({16384, 16384, 1, 128})
          ->UseRealTime();
    }
    // Eight query heads read what one reads.
    benchmark::internal::Benchmark* const wide =
        benchmark::RegisterBenchmark(("attention_gqa8/" + name).c_str(), AttentionBench, dtype, 64)
            ->Args({1, 512, 1, 128})
            ->UseRealTime();
    if (!bench->device->spec().host_memory && dtype == DType::kBF16) {
      wide->Args({1, 8192, 64, 128});
    }
  }
}

// The hot loops of a smaller processor than this one: generic, avx2, avx512, avx512_bf16.
bool UseIsaNamed(const char* name) {
  for (int i = 0; i < cpu::IsaCount(); ++i) {
    if (std::strcmp(cpu::IsaAt(i).name, name) == 0) return cpu::UseIsa(i), true;
  }
  std::fprintf(stderr, "--isa %s: this processor has", name);
  for (int i = 0; i < cpu::IsaCount(); ++i) std::fprintf(stderr, " %s", cpu::IsaAt(i).name);
  std::fputc('\n', stderr);
  return false;
}

// What this machine may lack.
absl::Status Open(const DeviceOptions& options, Bench* opened) {
  ASSIGN_OR_RETURN(opened->device, OpenDevice(options));
  ASSIGN_OR_RETURN(opened->stream, opened->device->NewStream());
  if (!opened->device->spec().host_memory) {
    ASSIGN_OR_RETURN(opened->no_room, opened->device->NewStream());
    DeviceOptions with_cublas_lt = options;
    with_cublas_lt.cublas_lt = true;
    ASSIGN_OR_RETURN(opened->cublas_lt_device, OpenDevice(with_cublas_lt));
    ASSIGN_OR_RETURN(opened->cublas_lt, opened->cublas_lt_device->NewStream());
  }
  ASSIGN_OR_RETURN(opened->ceilings, MeasureCeilings(*opened->stream));
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  DeviceOptions options;
  while (argc >= 3 && argv[1][0] == '-' && argv[1][1] == '-') {
    if (std::strcmp(argv[1], "--threads") == 0) {
      options.threads = std::atoi(argv[2]);
    } else if (std::strcmp(argv[1], "--device") == 0) {
      options.name = argv[2];
    } else if (std::strcmp(argv[1], "--isa") == 0) {
      if (!UseIsaNamed(argv[2])) return 2;
    } else {
      break;
    }
    argv[2] = argv[0];
    argc -= 2;
    argv += 2;
  }
  Bench state;
  if (const absl::Status status = Open(options, &state); !status.ok()) {
    std::fprintf(stderr, "op_bench: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  bench = &state;
  const DeviceSpec& spec = state.device->spec();
  const std::string name = spec.host_memory
                               ? absl::StrCat(cpu::BestIsa().name, ", ", spec.threads,
                                              spec.threads == 1 ? " thread" : " threads")
                               : spec.name;
  std::printf("%s: read %.1f GB/s, f32 %.0f, bf16 %.0f, f16 %.0f GFLOP/s\n", name.c_str(),
              state.ceilings.read_bytes_per_s / 1e9, state.ceilings.matmul_flops_f32 / 1e9,
              state.ceilings.matmul_flops_bf16 / 1e9, state.ceilings.matmul_flops_f16 / 1e9);
  RegisterMatMuls();
  RegisterAttention();
  RegisterRowOps();
  RegisterTokenOps();
  RegisterMolSearch();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
