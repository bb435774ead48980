// The sampler against its definition: naive filters over the whole vocabulary in double, drawn
// frequencies against the softmax, and the same choice however the vocabulary is cut over ranks
// (run with 1, 2 and 4).

#include "runtime/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/philox.h"
#include "parallel/process_groups.h"
#include "tests/parallel/world.h"
#include "tests/reference/sampling_reference.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

std::vector<float> MakeLogits(int64_t vocabulary, uint64_t seed, double scale) {
  std::vector<float> out(vocabulary);
  for (int64_t i = 0; i < vocabulary; ++i)
    out[i] = static_cast<float>(scale * RandomValue(seed, i));
  return out;
}

// The definition, naively: penalties, then what the reference makes of it.
TokenId Naive(std::vector<float> x, const SamplingParams& p, const std::vector<TokenId>& tokens,
              int64_t prompt_tokens) {
  for (int32_t id = 0; id < static_cast<int32_t>(x.size()); ++id) {
    if (std::count(tokens.begin(), tokens.end(), id) == 0) continue;
    x[id] = x[id] > 0 ? x[id] / p.repetition_penalty : x[id] * p.repetition_penalty;
    const auto count = std::count(tokens.begin() + prompt_tokens, tokens.end(), id);
    if (count > 0) x[id] -= p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
  }
  return reference::ChooseToken({x.begin(), x.end()}, {.greedy = p.temperature == 0.0f,
                                                       .inverse_temperature = 1.0 / p.temperature,
                                                       .top_k = p.top_k,
                                                       .top_p = p.top_p,
                                                       .min_p = p.min_p,
                                                       .seed = p.seed,
                                                       .position = tokens.size()});
}

class SamplerTest : public ::testing::Test {
 protected:
  SamplerTest()
      : groups_(CreateProcessGroups(World(), {World().size(), 1, 1}, device_.device()).value()) {}
  std::vector<SampledToken> Sample(const std::vector<std::vector<float>>& logits,
                                   const std::vector<SampleRow>& rows) {
    const Range mine =
        PieceOf(static_cast<int64_t>(logits[0].size()), World().size(), World().rank());
    std::vector<float> shard;
    for (const auto& row : logits)
      shard.insert(shard.end(), row.begin() + mine.begin, row.begin() + mine.end);
    // Where there is room for it the device chooses, else the host: the same.
    std::vector<float> again = shard;  // penalties change them
    std::vector<SampledToken> by_host = SampleShard(shard, mine, logits[0].size(), rows, false);
    const std::vector<SampledToken> chosen = SampleShard(again, mine, logits[0].size(), rows, true);
    EXPECT_EQ(chosen.size(), by_host.size());
    for (size_t r = 0; r < std::min(chosen.size(), by_host.size()); ++r) {
      EXPECT_EQ(chosen[r].token, by_host[r].token) << "row " << r;
      EXPECT_EQ(chosen[r].logprob, by_host[r].logprob) << "row " << r;
      EXPECT_EQ(chosen[r].top, by_host[r].top) << "row " << r;
    }
    return by_host;
  }
  std::vector<SampledToken> SampleShard(std::vector<float>& shard, Range mine, size_t vocabulary,
                                        const std::vector<SampleRow>& rows, bool reserve) {
    const auto count = static_cast<int64_t>(rows.size());
    Sampler sampler(groups_.tp.get(), groups_.tp.get(), mine, static_cast<int64_t>(vocabulary));
    if (reserve) {
      EXPECT_TRUE(sampler.Reserve(device_.device(), count, 16).ok());
    }
    std::vector<SampledToken> sampled;
    const absl::Status status =
        sampler.Sample(device_.stream(),
                       TensorView(shard.data(), DType::kF32, {count, mine.size()}), rows, &sampled);
    EXPECT_TRUE(status.ok()) << status;
    return sampled;
  }
  TestDevice device_;
  ProcessGroups groups_;
};

TEST_F(SamplerTest, EqualsTheDefinitionUnderAllFilters) {
  const std::vector<TokenId> history = {3, 5, 5, 7, 11, 11, 11, 200};
  for (const int64_t vocabulary : {13, 515, 4096}) {
    for (const double scale : {0.01, 1.0, 12.0}) {
      std::vector<std::vector<float>> logits;
      std::vector<SamplingParams> params;
      for (int way = 0; way < 48; ++way) {
        SamplingParams p;
        p.temperature = way % 6 == 0 ? 0.0f : 0.3f * static_cast<float>(way % 6);
        p.top_k = way % 4 == 1 ? 5 : way % 4 == 2 ? 100 : 0;
        p.top_p = way % 3 == 1 ? 0.7f : way % 3 == 2 ? 0.999f : 1.0f;
        p.min_p = way % 5 == 3 ? 0.2f : 0.0f;
        if (way % 2 == 1)
          p.repetition_penalty = 1.3f, p.presence_penalty = 0.4f, p.frequency_penalty = 0.25f;
        p.seed = 77 + way;
        p.logprobs = way % 7 == 0 ? 3 : -1;
        params.push_back(p);
        logits.push_back(MakeLogits(vocabulary, 1000 + way, scale));
      }
      std::vector<SampleRow> rows;
      for (const SamplingParams& p : params) rows.push_back({&p, history, 3});
      const std::vector<SampledToken> got = Sample(logits, rows);
      for (size_t i = 0; i < rows.size(); ++i) {
        EXPECT_EQ(got[i].token, Naive(logits[i], params[i], history, 3))
            << "way " << i << " vocabulary " << vocabulary << " scale " << scale;
      }
    }
  }
}

TEST_F(SamplerTest, LogProbabilitiesAreTheModelsOwn) {
  const std::vector<float> logits = MakeLogits(515, 5, 4.0);
  SamplingParams p;
  p.logprobs = 4;
  p.repetition_penalty = 5.0f;
  const TokenId best =
      static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  const std::vector<TokenId> history = {best};
  const SampledToken got = Sample({logits}, {{&p, history, 1}})[0];
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  EXPECT_NE(got.token, best) << "the penalty must have moved the choice";
  EXPECT_NEAR(got.logprob, logits[got.token] - std::log(sum), 1e-5);
  ASSERT_EQ(got.top.size(), 4u);
  EXPECT_EQ(got.top[0].first, best);
  EXPECT_NEAR(got.top[0].second, logits[best] - std::log(sum), 1e-5);
  EXPECT_GE(got.top[2].second, got.top[3].second);
}

// More than a shard, and than a vocabulary, has tokens.
TEST_F(SamplerTest, MoreLogProbabilitiesThanTokensAreAllTokens) {
  SamplingParams p;
  p.logprobs = 20;
  for (const int64_t vocabulary : {13, 24, 64}) {
    const std::vector<float> row = MakeLogits(vocabulary, 6, 4.0),
                             other = MakeLogits(vocabulary, 7, 4.0);
    const SampleRow asked{&p, {}, 0};
    const std::vector<SampledToken> got = Sample({row, other, row}, {asked, asked, asked});
    for (const SampledToken& token : got)
      EXPECT_EQ(token.top.size(), static_cast<size_t>(std::min<int64_t>(vocabulary, 20)));
    EXPECT_EQ(got[0].top, got[2].top);
    EXPECT_NE(got[0].top, got[1].top);
  }
}

#if defined(TRIREME_HOST_CUDA)
// One rank has no memory for what a flat row needs in the end: all hear of it, and a later call
// finds everything as it was.
TEST_F(SamplerTest, ARankThatLacksMemoryFailsTheCallOnAllRanks) {
  constexpr int64_t kVocabulary = 32768;
  const std::unique_ptr<Device> device = NewHostCudaDevice();
  const std::unique_ptr<Stream> stream = device->NewStream().value();
  const Range mine = PieceOf(kVocabulary, World().size(), World().rank());
  Communicator* tp = groups_.tp.get();
  const Tensor logits = Tensor::Create(*device, DType::kF32, {1, mine.size()}).value();
  SamplingParams flat;
  flat.temperature = 1.0f;
  flat.top_p = 0.9f;
  const SampleRow row{&flat, {}, 0};
  const auto sample = [&](Sampler& sampler) -> absl::StatusOr<TokenId> {
    const std::vector<float> zeros(mine.size());
    stream->Copy(logits.view().data, zeros.data(), zeros.size() * sizeof(float));
    std::vector<SampledToken> sampled;
    const absl::Status status = sampler.Sample(*stream, logits.view(), {&row, 1}, &sampled);
    if (!status.ok()) return status;
    return sampled[0].token;
  };
  for (int full = 0; full < World().size(); ++full) {
    Sampler sampler(tp, tp, mine, kVocabulary);
    ASSERT_TRUE(sampler.Reserve(*device, 2, 16).ok());
    for (int again = 0; again < 2; ++again) {
      if (World().rank() == full) {
        HostCudaTestHooks().allocating = [](size_t) {
          return absl::ResourceExhaustedError("the device is full");
        };
      }
      const absl::Status failed = sample(sampler).status();
      HostCudaTestHooks().allocating = nullptr;
      EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted) << failed;
      EXPECT_EQ(failed.message(), World().rank() == full
                                      ? "the device is full"
                                      : "sampling failed on tensor-parallel rank " +
                                            std::to_string(full) + ": its line says why");
    }
    const absl::StatusOr<TokenId> token = sample(sampler);
    ASSERT_TRUE(token.ok()) << token.status();
    EXPECT_EQ(*token, Naive(std::vector<float>(kVocabulary), flat, {}, 0));
  }
}
#endif

// Rows of NaN, of infinities, and of both, in company: they get no token on any rank, and the
// others get theirs.
TEST_F(SamplerTest, RowsWithoutAFiniteLogitGetNoTokenAndDisturbNobody) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr int64_t kVocabulary = 515;
  SamplingParams ways[4];
  ways[1].temperature = 0.9f;
  ways[2].temperature = 0.9f, ways[2].top_p = 0.8f;
  ways[3].temperature = 0.9f, ways[3].top_k = 20, ways[3].min_p = 0.1f;
  for (SamplingParams& way : ways) {
    SCOPED_TRACE(&way - ways);
    way.seed = 9;
    const std::vector<float> good = MakeLogits(kVocabulary, 21, 4.0);
    std::vector<float> overflown(kVocabulary, -kInfinity), mixed(kVocabulary, kNan);
    overflown[100] = mixed[500] = kInfinity;
    const std::vector<TokenId> history{4, 5};
    const SampleRow row{&way, history, 2};
    const TokenId alone = Sample({good}, {row})[0].token;
    ASSERT_GE(alone, 0);
    const std::vector<SampledToken> got =
        Sample({good, std::vector<float>(kVocabulary, kNan), overflown, mixed,
                std::vector<float>(kVocabulary, -kInfinity), good},
               {row, row, row, row, row, row});
    std::vector<TokenId> tokens;
    for (const SampledToken& token : got) tokens.push_back(token.token);
    EXPECT_EQ(tokens, (std::vector<TokenId>{alone, -1, -1, -1, -1, alone}));
  }
}

// As a worker with graphs does it: the device's part apart, for more rows than there are, one kind
// of rows after the other in the same memory.
TEST_F(SamplerTest, PreparedRowsGetWhatSampleGivesThem) {
  constexpr int64_t kVocabulary = 515, kPadded = 5;
  const std::vector<TokenId> history = {3, 5, 5, 7};
  std::vector<TokenId> long_history(400);  // more penalties than there is room for
  std::iota(long_history.begin(), long_history.end(), 0);
  SamplingParams greedy, drawn, min_p, penalized, top_k, top_p, logprobs, wide_k, wide_logprobs;
  for (SamplingParams* p : {&drawn, &min_p, &penalized, &top_k, &top_p, &wide_k})
    p->temperature = 0.9f;
  wide_k.top_k = 100;
  wide_logprobs.logprobs = 60;
  min_p.min_p = 0.1f;
  penalized.repetition_penalty = 1.5f;
  top_k.top_k = 7;
  top_p.top_p = 0.8f;
  logprobs.logprobs = 2;
  const Range mine = PieceOf(kVocabulary, World().size(), World().rank());
  Communicator* tp = groups_.tp.get();
  Sampler prepared(tp, tp, mine, kVocabulary), whole(tp, tp, mine, kVocabulary);
  ASSERT_TRUE(prepared.Reserve(device_.device(), kPadded, 16).ok());
  const int64_t reserved = prepared.device_bytes();
  EXPECT_LE(reserved, Sampler::ReservedBytes(kPadded, World().size()));
  const void* place = nullptr;
  uint64_t seed = 0;
  for (const std::vector<const SamplingParams*>& kinds :
       std::vector<std::vector<const SamplingParams*>>{
           {&greedy, &drawn, &drawn},
           {&drawn, &min_p},
           {&greedy, &greedy, &greedy, &greedy, &greedy},
           {&penalized, &drawn},
           {&greedy},
           {&top_k, &drawn, &greedy},
           {&top_p},
           {&logprobs, &greedy},
           {&min_p, &drawn, &greedy},
           {&logprobs, &top_k, &min_p, &penalized, &top_p},
           {&penalized},  // of the long history
           {&wide_k, &drawn, &penalized},
           {&wide_logprobs, &top_p},
           {&top_p, &greedy, &penalized}}) {
    std::vector<SamplingParams> params;
    for (const SamplingParams* kind : kinds) {
      params.push_back(*kind);
      params.back().seed = ++seed;
    }
    std::vector<SampleRow> rows;
    const bool long_row = kinds.size() == 1 && kinds[0] == &penalized;
    for (const SamplingParams& p : params)
      rows.push_back({&p, long_row ? long_history : history, 2});
    const int64_t padded = long_row ? 1 : kPadded;
    std::vector<float> logits;
    for (int64_t r = 0; r < kPadded; ++r) {
      const std::vector<float> row = MakeLogits(kVocabulary, 100 * seed + r, 12.0);
      logits.insert(logits.end(), row.begin() + mine.begin, row.begin() + mine.end);
    }
    std::vector<float> again = logits;  // penalties change them
    const auto rows_of = [&](std::vector<float>& values, int64_t count) {
      return TensorView(values.data(), DType::kF32, {count, mine.size()});
    };
    const auto count = static_cast<int64_t>(rows.size());
    Stream& stream = device_.stream();
    std::vector<SampledToken> got, expected;
    const int64_t host_choices = prepared.host_choices();
    prepared.Prepare(stream, rows, padded);
    if (place == nullptr) place = prepared.answers().data;
    EXPECT_EQ(prepared.answers().data, place);
    prepared.Enqueue(stream, rows_of(logits, padded));
    ASSERT_TRUE(prepared.Finish(stream, rows_of(logits, count), &got).ok());
    const bool wide = std::any_of(kinds.begin(), kinds.end(), [&](const SamplingParams* kind) {
      return kind == &wide_k || kind == &wide_logprobs;
    });
    EXPECT_EQ(prepared.host_choices() - host_choices, wide || long_row ? 1 : 0) << seed;
    ASSERT_TRUE(whole.Sample(stream, rows_of(again, count), rows, &expected).ok());
    ASSERT_EQ(got.size(), expected.size());
    for (size_t r = 0; r < got.size(); ++r) {
      EXPECT_EQ(got[r].token, expected[r].token) << r << " at seed " << seed;
      EXPECT_EQ(got[r].logprob, expected[r].logprob);
      EXPECT_EQ(got[r].top, expected[r].top);
    }
  }
  EXPECT_EQ(prepared.device_bytes(), reserved);
}

// Shards whose largest scores are far apart: those with small ones draw what min-p does not leave.
TEST_F(SamplerTest, MinPHangsOnTheLargestScoreOfAllShards) {
  constexpr int64_t kVocabulary = 64;
  std::vector<std::vector<float>> logits;
  std::vector<SamplingParams> params(200);
  for (size_t i = 0; i < params.size(); ++i) {
    // The threshold lies inside of every shard's scores, or above all but the first one's.
    logits.push_back(MakeLogits(kVocabulary, 900 + i, 2.0));
    for (int64_t id = 0; id < kVocabulary / 4; ++id) logits[i][id] += i % 2 == 0 ? 0.8f : 20.0f;
    params[i].temperature = 1.2f;
    params[i].min_p = i % 3 == 0 ? 0.3f : 0.05f;
    params[i].seed = i;
  }
  std::vector<SampleRow> rows;
  for (const SamplingParams& p : params) rows.push_back({&p, {}, 0});
  const std::vector<SampledToken> got = Sample(logits, rows);
  for (size_t i = 0; i < rows.size(); ++i)
    EXPECT_EQ(got[i].token, Naive(logits[i], params[i], {}, 0)) << i;
}

TEST_F(SamplerTest, SmallerIdWinsATie) {
  SamplingParams p;
  EXPECT_EQ(Sample({std::vector<float>(40, 1.5f)}, {{&p, {}, 0}})[0].token, 0);
}

// 20,000 draws of 8 tokens: each frequency within 5 standard deviations of its probability.
TEST_F(SamplerTest, DrawsFollowTheSoftmax) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f, -3.0f, 1.5f, 0.2f};
  const double temperature = 0.8;
  double total = 0;
  for (const float x : logits) total += std::exp(x / temperature);
  std::vector<int> count(8);
  constexpr int kDraws = 20000, kBatch = 500;
  std::vector<SamplingParams> params(kBatch);
  for (int begin = 0; begin < kDraws; begin += kBatch) {
    std::vector<SampleRow> rows;
    for (int i = 0; i < kBatch; ++i) {
      params[i].temperature = static_cast<float>(temperature);
      params[i].seed = static_cast<uint64_t>(begin + i);
      rows.push_back({&params[i], {}, 0});
    }
    for (const SampledToken& got : Sample(std::vector<std::vector<float>>(kBatch, logits), rows))
      ++count[got.token];
  }
  for (int i = 0; i < 8; ++i) {
    const double probability = std::exp(logits[i] / temperature) / total;
    EXPECT_NEAR(count[i], kDraws * probability,
                5 * std::sqrt(kDraws * probability * (1 - probability)))
        << "token " << i;
  }
}

// Known answers of Philox4x32-10 from the authors' Random123 distribution (kat_vectors).
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(Philox4x32({{0, 0, 0, 0}}, 0, 0),
            (PhiloxBlock{{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
  constexpr uint32_t kOnes = 0xffffffffu;
  EXPECT_EQ(Philox4x32({{kOnes, kOnes, kOnes, kOnes}}, kOnes, kOnes),
            (PhiloxBlock{{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
}

}  // namespace
}  // namespace trireme
