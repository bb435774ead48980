// Ops that belong to a step's tokens: their embedding, rotation and cache, the choice of the next.
#include <limits>

#include "kernels/sampling.h"
#include "tests/bench/op_bench.h"

namespace trireme {
namespace {

constexpr int64_t kVocabulary = 128256;

// Ids from all over the table, of which nothing is in a cache.
void EmbeddingBench(benchmark::State& state, DType dtype) {
  constexpr int64_t kHidden = 2048;
  const int64_t tokens = state.range(0);
  const std::vector<char> table = FillHost(dtype, kVocabulary * kHidden);
  const auto packed = Ok(PackLinear(
      *bench->stream, ConstTensorView(table.data(), dtype, {kVocabulary, kHidden}), dtype));
  std::vector<int32_t> numbers;
  for (int64_t i = 1; i <= tokens; ++i) {
    numbers.push_back(static_cast<int32_t>(i * 2654435761 % kVocabulary));
  }
  const Tensor ids = Integers(numbers);
  const Tensor out = Ok(Tensor::Create(*bench->device, dtype, {tokens, kHidden}));
  Measure(state, [&] { Embedding(*bench->stream, ids.view(), *packed, 0, out.view()); });
  Report(state, EmbeddingCost(tokens, kHidden, dtype), DType::kF32);
}

// 32 query and 8 kv heads of 64. Unfused, ops that together move what a rotation in place and a
// store behind it would: a second pass reads the rotated keys and writes them once more, a norm
// reads and writes its heads.
void RopeBench(benchmark::State& state, DType dtype, bool norm, bool fused) {
  constexpr int64_t kQ = 32, kKv = 8, kDim = 64, kPageSize = 16, kPositions = 4096;
  Stream& stream = *bench->stream;
  const int64_t tokens = state.range(0), slots = (tokens + kPageSize - 1) / kPageSize * kPageSize;
  std::vector<int32_t> places, rows;
  std::vector<int64_t> mapping;
  for (int64_t i = 0; i < tokens; ++i) {
    places.push_back(static_cast<int32_t>(i * 37 % kPositions));
    rows.push_back(static_cast<int32_t>(i));
    mapping.push_back(i);
  }
  const Tensor positions = Integers(places), indices = Integers(rows),
               slot_mapping = Upload(DType::kI64, {tokens}, mapping.data());
  const Tensor angles = Filled(DType::kF32, {kPositions, kDim}), weight = Filled(dtype, {kDim});
  const Tensor qkv = Filled(dtype, {tokens, (kQ + 2 * kKv) * kDim});
  const Shape cache = {slots / kPageSize, kPageSize, kKv, kDim};
  const Tensor k = Filled(dtype, cache), v = Filled(dtype, cache);
  const Tensor q_heads = Filled(dtype, {tokens * kQ, kDim}),
               k_heads = Filled(dtype, {tokens * kKv, kDim}),
               stored = Filled(dtype, {tokens, kKv * kDim});
  RopeParams rope{angles.view(), {}, {}, 1e-5f};
  if (norm && fused) rope.q_norm = weight.view(), rope.k_norm = weight.view();
  const PagedKv kv{k.view(), v.view(), {}};
  const ConstTensorView keys(k.view().data, dtype, {slots, kKv * kDim});
  Measure(state, [&] {
    if (norm && !fused) {
      const NormParams params{NormKind::kRms, weight.view(), {}, 1e-5f};
      Norm(stream, q_heads.view(), params, q_heads.view());
      Norm(stream, k_heads.view(), params, k_heads.view());
    }
    RopeAndStoreKv(stream, qkv.view(), positions.view(), slot_mapping.view(), rope, kQ, kv);
    if (!fused) GatherRows(stream, keys, indices.view(), stored.view());
  });
  Report(state, RopeAndStoreKvCost(tokens, kQ, kKv, kDim, dtype), DType::kF32);
}

// From -8 to 8 in no order, hardly two alike: ties are not what a choice spends its time on.
Tensor Logits(int64_t rows) {
  std::vector<float> logits(static_cast<size_t>(rows * kVocabulary));
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto hash = static_cast<uint32_t>((i + 1) * 2654435761u);
    logits[i] = static_cast<float>(hash >> 8) / (1 << 20) - 8.0f;
  }
  return Upload(DType::kF32, {rows, kVocabulary}, logits.data());
}

// What a request with top-k asks for.
void SummarizeLogitsBench(benchmark::State& state) {
  constexpr int64_t kCandidates = 50;
  const int64_t rows = state.range(0);
  const std::vector<double> inverse(rows, 1.25);
  const Tensor logits = Logits(rows);
  const Tensor temperatures = Upload(DType::kF64, {rows}, inverse.data());
  const Tensor counts = Integers(std::vector<int32_t>(rows, kCandidates));
  const Tensor largest = Ok(Tensor::Create(*bench->device, DType::kF32, {rows}));
  const Tensor sum = Ok(Tensor::Create(*bench->device, DType::kF64, {rows}));
  const Tensor scores = Ok(Tensor::Create(*bench->device, DType::kF32, {rows, kCandidates}));
  const Tensor columns = Ok(Tensor::Create(*bench->device, DType::kI32, {rows, kCandidates}));
  Measure(state, [&] {
    SummarizeLogits(*bench->stream, logits.view(), temperatures.view(), counts.view(),
                    largest.view(), sum.view(), scores.view(), columns.view());
  });
  Report(state, SummarizeLogitsCost(rows, kVocabulary), DType::kF32);
}

// From the whole vocabulary.
void DrawTokensBench(benchmark::State& state) {
  const int64_t rows = state.range(0);
  std::vector<int64_t> of_rows;
  std::vector<double> asked;
  for (int64_t i = 0; i < rows; ++i) {
    of_rows.insert(of_rows.end(), {i, 100 + i});
    asked.insert(asked.end(), {1.25, -std::numeric_limits<double>::infinity()});
  }
  const Tensor logits = Logits(rows);
  const Tensor seeds = Upload(DType::kI64, {rows, 2}, of_rows.data());
  const Tensor limits = Upload(DType::kF64, {rows, 2}, asked.data());
  const Tensor largest = Filled(DType::kF32, {rows});
  const Tensor keys = Ok(Tensor::Create(*bench->device, DType::kF64, {rows}));
  const Tensor scores = Ok(Tensor::Create(*bench->device, DType::kF32, {rows}));
  const Tensor columns = Ok(Tensor::Create(*bench->device, DType::kI32, {rows}));
  Measure(state, [&] {
    DrawTokens(*bench->stream, logits.view(), seeds.view(), limits.view(), largest.view(), 0,
               keys.view(), scores.view(), columns.view());
  });
  Report(state, DrawTokensCost(rows, kVocabulary), DType::kF32);
}

}  // namespace

void RegisterTokenOps() {
  benchmark::RegisterBenchmark("embedding/bf16", EmbeddingBench, DType::kBF16)
      ->Arg(1)
      ->Arg(512)
      ->UseRealTime();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const bool norm : {false, true}) {
      for (const bool fused : {true, false}) {
        const std::string name =
            std::string(norm ? "rope_norm_and_store_kv" : "rope_and_store_kv") +
            (fused ? "/" : "_unfused/") + Name(dtype);
        benchmark::RegisterBenchmark(name.c_str(), RopeBench, dtype, norm, fused)
            ->Arg(1)
            ->Arg(64)
            ->Arg(512)
            ->UseRealTime();
      }
    }
  }
  benchmark::RegisterBenchmark("summarize_logits", SummarizeLogitsBench)
      ->Arg(1)
      ->Arg(64)
      ->UseRealTime();
  benchmark::RegisterBenchmark("draw_tokens", DrawTokensBench)->Arg(1)->Arg(64)->UseRealTime();
}

}  // namespace trireme
