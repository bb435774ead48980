// Ops that do a little with every element of some rows: read bandwidth is their ceiling.
#include "kernels/sampling.h"
#include "tests/bench/op_bench.h"

namespace trireme {
namespace {

NormParams ParamsOf(NormKind kind, const Tensor& weight) {
  const bool layer = kind == NormKind::kLayer;
  return {kind, weight.view(), layer ? ConstTensorView(weight.view()) : ConstTensorView(), 1e-5f};
}

template <NormKind kKind>
void NormBench(benchmark::State& state, DType dtype, int64_t hidden) {
  const Tensor x = Filled(dtype, {state.range(0), hidden}), weight = Filled(dtype, {hidden});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {state.range(0), hidden}));
  Measure(state, [&] { Norm(*bench->stream, x.view(), ParamsOf(kKind, weight), out.view()); });
  Report(state, NormCost(kKind, state.range(0), hidden, dtype), DType::kF32);
}

// Unfused, the two ops that it replaces.
template <NormKind kKind, bool kFused>
void AddNormBench(benchmark::State& state, DType dtype, int64_t hidden) {
  const Shape shape = {state.range(0), hidden};
  const Tensor residual = Filled(dtype, shape), delta = Filled(dtype, shape),
               weight = Filled(dtype, {hidden});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, shape));
  Measure(state, [&] {
    if (kFused) {
      AddNorm(*bench->stream, residual.view(), delta.view(), ParamsOf(kKind, weight), out.view());
    } else {
      Add(*bench->stream, residual.view(), delta.view());
      Norm(*bench->stream, residual.view(), ParamsOf(kKind, weight), out.view());
    }
  });
  Report(state, AddNormCost(kKind, state.range(0), hidden, dtype), DType::kF32);
}

void AddBench(benchmark::State& state, DType dtype, int64_t hidden) {
  const Tensor x = Filled(dtype, {state.range(0), hidden}),
               delta = Filled(dtype, {state.range(0), hidden});
  Measure(state, [&] { Add(*bench->stream, x.view(), delta.view()); });
  Report(state, AddCost(state.range(0), hidden, dtype), DType::kF32);
}

void GeluBench(benchmark::State& state, DType dtype, int64_t intermediate) {
  const Tensor x = Filled(dtype, {state.range(0), intermediate});
  Measure(state, [&] { Gelu(*bench->stream, x.view()); });
  Report(state, GeluCost(state.range(0), intermediate, dtype), DType::kF32);
}

void SiluBench(benchmark::State& state, DType dtype, int64_t intermediate) {
  const Tensor gate_up = Filled(dtype, {state.range(0), 2 * intermediate});
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {state.range(0), intermediate}));
  Measure(state, [&] { SiluAndMul(*bench->stream, gate_up.view(), out.view()); });
  Report(state, SiluAndMulCost(state.range(0), intermediate, dtype), DType::kF32);
}

// The last rows of as many prompts of 32 tokens.
void GatherRowsBench(benchmark::State& state, DType dtype, int64_t hidden) {
  constexpr int64_t kPrompt = 32;
  const int64_t rows = state.range(0);
  const Tensor x = Filled(dtype, {rows * kPrompt, hidden});
  std::vector<int32_t> last;
  for (int64_t i = 1; i <= rows; ++i) last.push_back(static_cast<int32_t>(i * kPrompt - 1));
  const Tensor indices = Integers(last);
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {rows, hidden}));
  Measure(state, [&] { GatherRows(*bench->stream, x.view(), indices.view(), out.view()); });
  Report(state, GatherRowsCost(rows, hidden, dtype), DType::kF32);
}

// Every sequence has said 512 different tokens. Amounts that change nothing, for the logits are the
// next round's too.
void PenalizeLogitsBench(benchmark::State& state, int64_t vocabulary) {
  constexpr int64_t kSaid = 512;
  const int64_t rows = state.range(0), count = rows * kSaid;
  const Tensor logits = Filled(DType::kF32, {rows, vocabulary});
  std::vector<int32_t> said;
  std::vector<float> unchanged;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = i % kSaid * (vocabulary / kSaid);
    said.insert(said.end(), {static_cast<int32_t>(i / kSaid), static_cast<int32_t>(column)});
    unchanged.insert(unchanged.end(), {1.0f, 0.0f});
  }
  const Tensor places = Upload(DType::kI32, {count, 2}, said.data());
  const Tensor amounts = Upload(DType::kF32, {count, 2}, unchanged.data());
  const Tensor all = Integers({static_cast<int32_t>(count)});
  const Tensor before = Ok(Tensor::Create(*bench->device, DType::kF32, {count}));
  Measure(state, [&] {
    PenalizeLogits(*bench->stream, logits.view(), all.view(), places.view(), amounts.view(),
                   before.view());
  });
  Report(state, PenalizeLogitsCost(count), DType::kF32);
}

}  // namespace

void RegisterRowOps() {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::string type = Name(dtype);
    struct Op {
      const char* name;
      void (*run)(benchmark::State&, DType, int64_t);
      int64_t width;
    };
    for (const Op& op : {Op{"rms_norm/", NormBench<NormKind::kRms>, 2048},
                         {"add_rms_norm/", AddNormBench<NormKind::kRms, true>, 2048},
                         {"add_rms_norm_unfused/", AddNormBench<NormKind::kRms, false>, 2048},
                         {"layer_norm/", NormBench<NormKind::kLayer>, 2048},
                         {"add_layer_norm/", AddNormBench<NormKind::kLayer, true>, 2048},
                         {"add_layer_norm_unfused/", AddNormBench<NormKind::kLayer, false>, 2048},
                         {"add/", AddBench, 2048},
                         {"gelu/", GeluBench, 8192},
                         {"silu_and_mul/", SiluBench, 8192},
                         {"gather_rows/", GatherRowsBench, 2048}}) {
      benchmark::RegisterBenchmark((op.name + type).c_str(), op.run, dtype, op.width)
          ->Arg(1)
          ->Arg(64)
          ->Arg(512)
          ->UseRealTime();
    }
    benchmark::RegisterBenchmark(("rms_norm_tiny/" + type).c_str(), NormBench<NormKind::kRms>,
                                 dtype, 64)
        ->Arg(1)
        ->UseRealTime();
  }
  benchmark::RegisterBenchmark("penalize_logits", PenalizeLogitsBench, 128256)
      ->Arg(1)
      ->Arg(64)
      ->UseRealTime();
}

}  // namespace trireme
