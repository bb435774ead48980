// Ops that belong to a step's tokens: their embedding, rotation and cache, the choice of the next.
#include <limits>

#include "kernels/sampling.h"
#include "kernels/token_choice.h"
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

constexpr int64_t kCandidates = 64, kTop = 32;

// Answers of shards that are all alike, each kind in its part of the shard's memory.
struct Answers {
  Tensor memory;
  ShardAnswers first;
  int64_t shard_bytes = 0;
};
Answers MakeAnswers(int64_t rows, int64_t shards) {
  std::vector<float> scores, zeros(rows * kTop), largest(rows, 8.0f);
  std::vector<int32_t> columns, none(rows * kTop, -1);
  const std::vector<double> sums(rows, 20.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int32_t i = 0; i < kCandidates; ++i) {
      scores.push_back(8.0f - static_cast<float>(i) / 8);
      columns.push_back((i * 37 + static_cast<int32_t>(r)) % 1000);
    }
  }
  const int64_t list = 4 * rows * kCandidates, top = 4 * rows * kTop, each = 8 * rows;
  Answers answers;
  answers.shard_bytes = 3 * list + 2 * top + 8 * each;
  answers.memory = Ok(Tensor::Create(*bench->device, DType::kU8, {shards * answers.shard_bytes}));
  ShardAnswers& first = answers.first;
  for (int64_t s = shards; s-- > 0;) {
    char* at = answers.memory.view().as<char>() + s * answers.shard_bytes;
    const auto add = [&](DType dtype, Shape shape, const void* values, int64_t room) {
      const TensorView view(at, dtype, shape);
      bench->stream->Copy(at, values, view.bytes());
      at += room;
      return view;
    };
    first.sum = add(DType::kF64, {rows}, sums.data(), each);
    first.keys = add(DType::kF64, {rows}, sums.data(), each);
    first.raw_sum = add(DType::kF64, {rows}, sums.data(), each);
    first.largest = add(DType::kF32, {rows}, largest.data(), each);
    first.drawn_scores = add(DType::kF32, {rows}, largest.data(), each);
    first.raw_largest = add(DType::kF32, {rows}, largest.data(), each);
    first.drawn_raw = add(DType::kF32, {rows}, largest.data(), each);
    first.drawn = add(DType::kI32, {rows}, none.data(), each);
    first.scores = add(DType::kF32, {rows, kCandidates}, scores.data(), list);
    first.raw = add(DType::kF32, {rows, kCandidates}, scores.data(), list);
    first.columns = add(DType::kI32, {rows, kCandidates}, columns.data(), list);
    first.raw_scores = add(DType::kF32, {rows, kTop}, zeros.data(), top);
    first.raw_columns = add(DType::kI32, {rows, kTop}, none.data(), top);
  }
  return answers;
}

// Of rows in which 128 tokens have a penalty.
void RestoreLogitsBench(benchmark::State& state) {
  constexpr int32_t kPenalties = 128;
  const int64_t rows = state.range(0), all = rows * kPenalties;
  std::vector<int32_t> of_places;
  for (int32_t r = 0; r < static_cast<int32_t>(rows); ++r) {
    for (int32_t i = 0; i < kPenalties; ++i) of_places.insert(of_places.end(), {r, 1000 * i});
  }
  const Tensor count = Integers({static_cast<int32_t>(all)}),
               places = Upload(DType::kI32, {all, 2}, of_places.data()),
               before = Ok(Tensor::Create(*bench->device, DType::kF32, {all}));
  const Answers answers = MakeAnswers(rows, 1);
  Measure(state, [&] {
    RestoreLogits(*bench->stream, count.view(), places.view(), before.view(), answers.first);
  });
  Report(state, RestoreLogitsCost(rows, kCandidates), DType::kF32);
}

// Top-k and top-p of 64 candidates from each of `shards`: what lies ready in a captured step.
void ChooseTokensBench(benchmark::State& state, int64_t shards) {
  const int64_t rows = state.range(0);
  std::vector<int32_t> choices(rows, static_cast<int32_t>(Choice::kFiltered)), ranges;
  std::vector<int32_t> counts(rows, kCandidates), logprobs(rows, -1);
  std::vector<double> filters;
  std::vector<int64_t> of_rows;
  for (int64_t r = 0; r < rows; ++r) {
    filters.insert(filters.end(), {1.25, 50, 0.95, 0, -std::numeric_limits<double>::infinity()});
    of_rows.insert(of_rows.end(), {r, 100 + r});
  }
  for (int32_t s = 0; s < shards; ++s) ranges.insert(ranges.end(), {16000 * s, 16000});
  const Answers answers = MakeAnswers(rows, shards);
  const Tensor ranges_there = Upload(DType::kI32, {shards, 2}, ranges.data()),
               choices_there = Integers(choices), counts_there = Integers(counts),
               logprobs_there = Integers(logprobs),
               filters_there = Upload(DType::kF64, {rows, kTokenFilters}, filters.data()),
               seeds = Upload(DType::kI64, {rows, 2}, of_rows.data());
  const Tensor tokens = Ok(Tensor::Create(*bench->device, DType::kI32, {rows})),
               logprob = Ok(Tensor::Create(*bench->device, DType::kF32, {rows})),
               top_tokens = Ok(Tensor::Create(*bench->device, DType::kI32, {rows, kTop})),
               top_logprobs = Ok(Tensor::Create(*bench->device, DType::kF32, {rows, kTop}));
  Measure(state, [&] {
    ChooseTokens(*bench->stream, answers.first, answers.shard_bytes,
                 {ranges_there.view(), choices_there.view(), filters_there.view(), seeds.view(),
                  counts_there.view(), logprobs_there.view()},
                 {tokens.view(), logprob.view(), top_tokens.view(), top_logprobs.view()});
  });
  Report(state, ChooseTokensCost(rows, shards, kCandidates), DType::kF32);
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
  benchmark::RegisterBenchmark("restore_logits", RestoreLogitsBench)
      ->Arg(1)
      ->Arg(64)
      ->UseRealTime();
  for (const int64_t shards : {1, 8}) {
    const std::string name = "choose_tokens/shards" + std::to_string(shards);
    benchmark::RegisterBenchmark(name.c_str(), ChooseTokensBench, shards)
        ->Arg(1)
        ->Arg(256)
        ->UseRealTime();
  }
}

}  // namespace trireme
