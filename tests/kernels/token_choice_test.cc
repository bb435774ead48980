// The choice of tokens on every device, from what the ops before it answer for each shard of a
// vocabulary, against its definition over the whole vocabulary.
#include "kernels/token_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/sampling.h"
#include "tests/reference/sampling_reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr double kLowest = -std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Asked {
  Choice choice = Choice::kGreedy;
  TokenFilters filters{1.0, 0.0, 1.0, 0.0, kLowest};
  int32_t count = 1;  // candidates of each shard
  int32_t logprobs = -1;
  uint64_t seed = 1, position = 0;
  bool sum() const {
    return choice == Choice::kFiltered && filters.top_k == 0 && filters.top_p < 1.0;
  }
};
Asked Filtered(double temperature, int32_t top_k, double top_p, double min_p, int32_t count) {
  return {.choice = Choice::kFiltered,
          .filters = {1.0 / temperature, 1.0 * top_k, top_p, min_p, kLowest},
          .count = count};
}

struct Penalty {
  int32_t row, column;  // of the whole vocabulary
  float repetition, subtract;
};

struct Chosen {
  std::vector<int32_t> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs;
};

class TokenChoiceTest : public ::testing::TestWithParam<DeviceCase> {
 protected:
  static constexpr int64_t kCandidates = 64, kTop = 8;

  TokenChoiceTest() : device_(GetParam()) {}
  template <typename T>
  Tensor Upload(const std::vector<T>& values, Shape shape) {
    Tensor tensor = device_.Zeros(kDTypeOf<T>, shape);
    device_.stream().Copy(tensor.view().data, values.data(), values.size() * sizeof(T));
    return tensor;
  }
  // Chooses from logits [rows][vocabulary], cut at `cuts` (0, ..., vocabulary).
  Chosen Choose(const std::vector<std::vector<float>>& logits, const std::vector<Asked>& asked,
                const std::vector<int64_t>& cuts, const std::vector<Penalty>& penalties = {});

  TestDevice device_;
};

// Places in a block of memory; the first pass over them tells its size.
struct Block {
  char* base = nullptr;
  int64_t used = 0;
  TensorView Add(DType dtype, Shape shape) {
    const TensorView view(base + used, dtype, shape);
    used += (view.bytes() + 15) / 16 * 16;
    return view;
  }
};
struct Places {
  TensorView largest, sum, scores, columns, keys, drawn_scores, drawn, raw_largest, raw_sum,
      raw_scores, raw_columns, raw, drawn_raw;
  Places(Block& b, int64_t r, int64_t k, int64_t l)
      : largest(b.Add(DType::kF32, {r})),
        sum(b.Add(DType::kF64, {r})),
        scores(b.Add(DType::kF32, {r, k})),
        columns(b.Add(DType::kI32, {r, k})),
        keys(b.Add(DType::kF64, {r})),
        drawn_scores(b.Add(DType::kF32, {r})),
        drawn(b.Add(DType::kI32, {r})),
        raw_largest(b.Add(DType::kF32, {r})),
        raw_sum(b.Add(DType::kF64, {r})),
        raw_scores(b.Add(DType::kF32, {r, l})),
        raw_columns(b.Add(DType::kI32, {r, l})),
        raw(b.Add(DType::kF32, {r, k})),
        drawn_raw(b.Add(DType::kF32, {r})) {}
  ShardAnswers answers() const {
    return {largest,     sum,     scores,     columns,     keys, drawn_scores, drawn,
            raw_largest, raw_sum, raw_scores, raw_columns, raw,  drawn_raw};
  }
};

Chosen TokenChoiceTest::Choose(const std::vector<std::vector<float>>& logits,
                               const std::vector<Asked>& asked, const std::vector<int64_t>& cuts,
                               const std::vector<Penalty>& penalties) {
  Stream& stream = device_.stream();
  const auto r = static_cast<int64_t>(logits.size());
  const auto shards = static_cast<int64_t>(cuts.size()) - 1;
  std::vector<double> sums, raw_sums, limits, filters;
  std::vector<int32_t> counts, raw_counts, choices, logprobs, ranges;
  std::vector<int64_t> seeds;
  for (const Asked& a : asked) {
    sums.push_back(a.sum() ? a.filters.inverse_temperature : 0.0);
    raw_sums.push_back(a.logprobs >= 0 ? 1.0 : 0.0);
    const bool drawn = a.choice == Choice::kDrawn;
    limits.insert(limits.end(), {drawn ? a.filters.inverse_temperature : 0.0, a.filters.margin});
    const TokenFilters& f = a.filters;
    filters.insert(filters.end(), {f.inverse_temperature, f.top_k, f.top_p, f.min_p, f.margin});
    counts.push_back(drawn && f.min_p == 0 ? 0 : a.count);
    raw_counts.push_back(std::max(0, a.logprobs));
    choices.push_back(static_cast<int32_t>(a.choice));
    logprobs.push_back(a.logprobs);
    seeds.insert(seeds.end(), {static_cast<int64_t>(a.seed), static_cast<int64_t>(a.position)});
  }
  const Tensor count = Upload(counts, {r}), raw_count = Upload(raw_counts, {r}),
               inverse = Upload(sums, {r}), raw_inverse = Upload(raw_sums, {r}),
               limit = Upload(limits, {r, 2}), seed = Upload(seeds, {r, 2});
  Block measure;
  Places(measure, r, kCandidates, kTop);
  const Tensor memory = device_.Zeros(DType::kU8, {shards * measure.used});
  std::optional<Places> first;
  for (int64_t s = 0; s < shards; ++s) {
    const int64_t begin = cuts[s], n = cuts[s + 1] - begin;
    std::vector<float> shard;
    for (const auto& row : logits)
      shard.insert(shard.end(), row.begin() + begin, row.begin() + begin + n);
    std::vector<int32_t> places;
    std::vector<float> amounts;
    for (const Penalty& p : penalties) {
      if (p.column < begin || p.column >= begin + n) continue;
      places.insert(places.end(), {p.row, p.column - static_cast<int32_t>(begin)});
      amounts.insert(amounts.end(), {p.repetition, p.subtract});
    }
    const std::vector<int32_t> there = {static_cast<int32_t>(places.size() / 2)};
    places.resize(places.size() + 2, 1000);  // room for one that is not there
    amounts.resize(places.size(), 9.0f);
    const auto room = static_cast<int64_t>(places.size() / 2);
    Block block{memory.view().as<char>() + s * measure.used};
    const Places p(block, r, kCandidates, kTop);
    if (s == 0) first.emplace(p);
    const Tensor values = Upload(shard, {r, n}), number = Upload(there, {1}),
                 where = Upload(places, {room, 2}), amount = Upload(amounts, {room, 2}),
                 before = device_.Zeros(DType::kF32, {room});
    SummarizeLogits(stream, values.view(), raw_inverse.view(), raw_count.view(), p.raw_largest,
                    p.raw_sum, p.raw_scores, p.raw_columns);
    PenalizeLogits(stream, values.view(), number.view(), where.view(), amount.view(),
                   before.view());
    SummarizeLogits(stream, values.view(), inverse.view(), count.view(), p.largest, p.sum, p.scores,
                    p.columns);
    DrawTokens(stream, values.view(), seed.view(), limit.view(), p.largest, begin, p.keys,
               p.drawn_scores, p.drawn);
    RestoreLogits(stream, number.view(), where.view(), before.view(), p.answers());
    ranges.insert(ranges.end(), {static_cast<int32_t>(begin), static_cast<int32_t>(n)});
    EXPECT_TRUE(stream.Synchronize().ok());
  }
  const Tensor tokens = device_.Zeros(DType::kI32, {r}), logprob = device_.Zeros(DType::kF32, {r}),
               top = device_.Zeros(DType::kI32, {r, kTop}),
               top_logprobs = device_.Zeros(DType::kF32, {r, kTop});
  const Tensor ranges_there = Upload(ranges, {shards, 2}), choices_there = Upload(choices, {r}),
               filters_there = Upload(filters, {r, kTokenFilters}),
               logprobs_there = Upload(logprobs, {r});
  ChooseTokens(stream, first->answers(), measure.used,
               {ranges_there.view(), choices_there.view(), filters_there.view(), seed.view(),
                count.view(), logprobs_there.view()},
               {tokens.view(), logprob.view(), top.view(), top_logprobs.view()});
  Chosen chosen;
  const auto take = [&](auto& to, ConstTensorView from) {
    to.resize(from.elements());
    stream.Copy(to.data(), from.data, from.bytes());
  };
  take(chosen.tokens, tokens.view());
  take(chosen.logprobs, logprob.view());
  take(chosen.top_tokens, top.view());
  take(chosen.top_logprobs, top_logprobs.view());
  EXPECT_TRUE(stream.Synchronize().ok());
  return chosen;
}

std::vector<float> RandomRow(int64_t n, uint64_t seed, double scale, int levels = 0) {
  std::vector<float> row(n);
  for (int64_t i = 0; i < n; ++i) {
    const double x = scale * RandomValue(seed, i);
    row[i] = static_cast<float>(levels > 0 ? std::round(x * levels) / levels : x);
  }
  return row;
}
int32_t Expected(const std::vector<float>& row, const Asked& a) {
  return reference::ChooseToken({row.begin(), row.end()},
                                {.greedy = a.choice == Choice::kGreedy,
                                 .inverse_temperature = a.filters.inverse_temperature,
                                 .top_k = static_cast<int64_t>(a.filters.top_k),
                                 .top_p = a.filters.top_p,
                                 .min_p = a.filters.min_p,
                                 .seed = a.seed,
                                 .position = a.position});
}
const std::vector<std::vector<int64_t>>& Cuts() {
  static const std::vector<std::vector<int64_t>> cuts = {
      {0, 600}, {0, 301, 600}, {0, 63, 300, 330, 331, 600}};
  return cuts;
}

// Ties in many places, few of them in one shard; the same token however the vocabulary is cut.
TEST_P(TokenChoiceTest, EqualsTheDefinitionHoweverTheVocabularyIsCut) {
  std::vector<Asked> asked = {
      {},
      {.choice = Choice::kDrawn, .filters = {0.8, 0, 1, 0, kLowest}},
      {.choice = Choice::kNone},
      Filtered(0.7, 1, 1.0, 0.0, 1),
      Filtered(1.3, 7, 1.0, 0.0, 7),
      Filtered(0.9, 64, 1.0, 0.0, 64),
      Filtered(0.9, 40, 0.8, 0.0, 40),
      Filtered(1.0, 0, 0.6, 0.0, 64),
      Filtered(1.0, 30, 0.9, 0.2, 30),
      Filtered(0.5, 0, 0.5, 0.4, 64),
  };
  for (const int levels : {0, 3}) {
    std::vector<std::vector<float>> logits;
    for (size_t r = 0; r < asked.size(); ++r) {
      asked[r].seed = 0x9E3779B97F4A7C15u * (r + 1);
      asked[r].position = (uint64_t{1} << 33) + r;
      logits.push_back(RandomRow(600, 70 + r, 6.0, levels));
    }
    for (const std::vector<int64_t>& cuts : Cuts()) {
      const Chosen chosen = Choose(logits, asked, cuts);
      for (size_t r = 0; r < asked.size(); ++r) {
        const bool none = asked[r].choice == Choice::kNone;
        EXPECT_EQ(chosen.tokens[r], none ? -1 : Expected(logits[r], asked[r]))
            << "row " << r << ", " << cuts.size() - 1 << " shards, levels " << levels;
      }
    }
  }
}

TEST_P(TokenChoiceTest, LogProbabilitiesAreThoseBeforeThePenalties) {
  constexpr int64_t kN = 600;
  const std::vector<float> row = RandomRow(kN, 5, 4.0);
  const auto best = static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
  const std::vector<Penalty> penalties = {{1, best, 9.0f, 1.0f}, {2, best, 1.2f, 0.5f}};
  std::vector<Asked> asked(4);
  asked[0].logprobs = 0;
  asked[1].logprobs = 5;
  asked[2] = {.choice = Choice::kDrawn, .logprobs = 8};
  for (const std::vector<int64_t>& cuts : Cuts()) {
    const Chosen chosen = Choose({row, row, row, row}, asked, cuts, penalties);
    double sum = 0.0;
    for (const float x : row) sum += std::exp(static_cast<double>(x));
    const auto logprob = [&](int32_t token) { return row[token] - std::log(sum); };
    std::vector<int32_t> order =
        reference::SummarizeLogits({row.begin(), row.end()}, 0.0, kTop).columns;
    EXPECT_EQ(chosen.tokens[0], best);
    EXPECT_NE(chosen.tokens[1], best) << "the penalty must have moved the choice";
    for (int r = 0; r < 3; ++r) {
      EXPECT_NEAR(chosen.logprobs[r], logprob(chosen.tokens[r]), 2e-6) << r;
      for (int i = 0; i < kTop; ++i) {
        const int32_t token = chosen.top_tokens[r * kTop + i];
        EXPECT_EQ(token, i < asked[r].logprobs ? order[i] : -1) << r << ' ' << i;
        if (token < 0) continue;
        EXPECT_NEAR(chosen.top_logprobs[r * kTop + i], logprob(token), 2e-6);
      }
    }
    EXPECT_EQ(chosen.logprobs[3], 0.0f);
  }
}

// A token for sure, or none: what the answers do not tell is the caller's to find out.
TEST_P(TokenChoiceTest, ItSaysWhereItCannotTell) {
  const std::vector<float> flat(600, 0.5f), row = RandomRow(600, 3, 4.0);
  std::vector<float> far = row, nan_shard = row, infinite = row;
  for (int i = 0; i < 301; ++i) far[i] += 50.0f;  // nothing of the second shard is near
  std::fill(nan_shard.begin() + 301, nan_shard.end(), kNan);
  infinite[7] = std::numeric_limits<float>::infinity();
  const Asked nucleus = Filtered(1.0, 0, 0.95, 0.0, 64);
  Asked min_p{.choice = Choice::kDrawn, .filters = {1.0, 0, 1, 0.5, std::log(0.5)}};
  const Chosen chosen =
      Choose({flat, far, nan_shard, infinite, row}, {nucleus, min_p, {}, {}, {}}, {0, 301, 600});
  EXPECT_EQ(chosen.tokens[0], -1) << "570 tokens make up 95 %";
  EXPECT_EQ(chosen.tokens[1], Expected(far, min_p));
  EXPECT_EQ(chosen.tokens[2], -1) << "a shard with no answer";
  EXPECT_EQ(chosen.tokens[3], -1) << "no finite number";
  EXPECT_EQ(chosen.tokens[4], Expected(row, {}));
}

// Whatever is drawn is what the definition draws. Where a shard would have to draw again, the
// candidates may tell.
TEST_P(TokenChoiceTest, MinPHangsOnTheLargestScoreOfAllShards) {
  std::vector<std::vector<float>> logits;
  std::vector<Asked> asked;
  for (uint64_t r = 0; r < 60; ++r) {
    logits.push_back(RandomRow(64, 900 + r, 2.0));
    for (int i = 0; i < 16; ++i) logits[r][i] += r % 2 == 0 ? 0.8f : 20.0f;
    const double min_p = r % 3 == 0 ? 0.3 : 0.05;
    asked.push_back({.choice = Choice::kDrawn,
                     .filters = {1.0 / 1.2, 0, 1, min_p, std::log(min_p) * 1.2},
                     .count = r % 5 == 0 ? 4 : 64,
                     .seed = r});
  }
  const Chosen whole = Choose(logits, asked, {0, 64}), cut = Choose(logits, asked, {0, 16, 40, 64});
  int untold = 0;
  for (size_t r = 0; r < asked.size(); ++r) {
    const int32_t expected = Expected(logits[r], asked[r]);
    EXPECT_EQ(whole.tokens[r], expected) << r;
    const bool few = r % 5 == 0;  // candidates, which may be too few to tell
    if (cut.tokens[r] < 0 && few) ++untold;
    if (cut.tokens[r] >= 0 || !few) {
      EXPECT_EQ(cut.tokens[r], expected) << r;
    }
  }
  EXPECT_GT(untold, 0);
  EXPECT_LT(untold, 12);
}

INSTANTIATE_TEST_SUITE_P(Devices, TokenChoiceTest, ::testing::ValuesIn(DeviceCases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace trireme
