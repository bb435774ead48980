// Sampling's ops on every device against their twins in tests/reference.
#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "tests/reference/sampling_reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

class SamplingTest : public ::testing::TestWithParam<DeviceCase> {
 protected:
  SamplingTest() : device_(GetParam()) {}
  Stream& stream() { return device_.stream(); }
  template <typename T>
  Tensor Upload(const std::vector<T>& values, Shape shape) {
    Tensor tensor = device_.Zeros(kDTypeOf<T>, shape);
    stream().Copy(tensor.view().data, values.data(), values.size() * sizeof(T));
    return tensor;
  }

  struct Summary {
    Tensor largest, sum, scores, columns;
  };
  // Each row asks for all there is room for, or for its own of `counts`.
  Summary Summarize(const std::vector<std::vector<float>>& rows, const std::vector<double>& inverse,
                    int64_t count, std::vector<int32_t> counts = {}) {
    counts.resize(rows.size(), static_cast<int32_t>(count));
    const int64_t r = static_cast<int64_t>(rows.size());
    const int64_t n = static_cast<int64_t>(rows[0].size());
    std::vector<float> flat;
    for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
    const Tensor logits = Upload(flat, {r, n}), inv = Upload(inverse, {r});
    Summary s{device_.Zeros(DType::kF32, {r}), device_.Zeros(DType::kF64, {r}),
              device_.Zeros(DType::kF32, {r, count}), device_.Zeros(DType::kI32, {r, count})};
    SummarizeLogits(stream(), logits.view(), inv.view(), Upload(counts, {r}).view(),
                    s.largest.view(), s.sum.view(), s.scores.view(), s.columns.view());
    return s;
  }
  // Row r is what the twin makes of it, candidates in any order.
  void ExpectSummary(const Summary& s, int64_t r, const std::vector<float>& row, double inverse) {
    const int64_t count = s.columns.view().dim(1);
    const reference::LogitSummary expected =
        reference::SummarizeLogits({row.begin(), row.end()}, inverse, count);
    EXPECT_EQ(s.largest.view().as<float>()[r], expected.largest);
    // Exponents reach 18 in magnitude and are rounded to fp32, as the terms are.
    EXPECT_NEAR(s.sum.view().as<double>()[r], expected.sum, expected.sum * 20 * 0x1p-24);
    using Candidates = std::vector<std::pair<int32_t, double>>;
    Candidates got, best;
    for (int64_t i = 0; i < count; ++i) {
      got.emplace_back(s.columns.view().row<int32_t>(r)[i], s.scores.view().row<float>(r)[i]);
      best.emplace_back(expected.columns[i], expected.scores[i]);
    }
    std::sort(got.begin(), got.end());
    std::sort(best.begin(), best.end());
    EXPECT_EQ(got, best) << "row " << r << " count " << count;
  }
  TestDevice device_;
};

std::vector<float> RandomRow(int64_t n, uint64_t seed, double scale, int levels = 0) {
  std::vector<float> row(n);
  for (int64_t i = 0; i < n; ++i) {
    const double x = scale * RandomValue(seed, i);
    row[i] = static_cast<float>(levels > 0 ? std::round(x * levels) / levels : x);
  }
  return row;
}

TEST_P(SamplingTest, SummaryEqualsReference) {
  for (const int64_t n : {1, 31, 513, 5000}) {
    std::vector<std::vector<float>> rows = {RandomRow(n, 1, 8.0), RandomRow(n, 2, 0.01),
                                            RandomRow(n, 3, 3.0, 2),  // many ties
                                            std::vector<float>(n, -1.5f), RandomRow(n, 4, 30.0)};
    rows[4][n / 2] = kNan;
    rows[1][n - 1] = -kInf;
    const std::vector<double> inverse = {1.0, 0.0, 2.5, 1.0, 0.3};
    for (const int64_t count :
         {int64_t{1}, std::min<int64_t>(n, 7), std::min<int64_t>(n, 600), n}) {
      const Summary s = Summarize(rows, inverse, count);
      for (size_t r = 0; r < rows.size(); ++r) {
        SCOPED_TRACE(::testing::Message() << "n " << n << " row " << r);
        ExpectSummary(s, static_cast<int64_t>(r), rows[r], inverse[r]);
      }
    }
  }
}

TEST_P(SamplingTest, ARowWithoutNumbersHasNoCandidates) {
  const Summary s = Summarize({std::vector<float>(40, kNan)}, {1.0}, 3);
  EXPECT_EQ(s.largest.view().as<float>()[0], -kInf);
  EXPECT_EQ(s.sum.view().as<double>()[0], 0.0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(s.columns.view().as<int32_t>()[i], -1);
}

// Rows of one call ask for different numbers of candidates, for a sum or none, or for nothing.
TEST_P(SamplingTest, EachRowGetsWhatItAsksFor) {
  constexpr int64_t kRoom = 40;
  const std::vector<int32_t> counts = {1, 40, 0, 7, 0, 2};
  const std::vector<double> inverse = {0.0, 1.0, 1.0, 0.0, 0.0, 0.5};
  std::vector<std::vector<float>> rows;
  for (uint64_t r = 0; r < counts.size(); ++r) rows.push_back(RandomRow(700, 30 + r, 4.0, 3));
  const Summary s = Summarize(rows, inverse, kRoom, counts);
  const Summary again = Summarize(rows, inverse, kRoom, counts);
  ExpectSameBits(s.scores.view(), again.scores.view());
  for (int64_t r = 0; r < static_cast<int64_t>(counts.size()); ++r) {
    SCOPED_TRACE(r);
    const float* scores = s.scores.view().row<float>(r);
    const int32_t* columns = s.columns.view().row<int32_t>(r);
    const std::vector<double> row(rows[r].begin(), rows[r].end());
    const reference::LogitSummary expected = reference::SummarizeLogits(row, inverse[r], counts[r]);
    const bool asks = counts[r] > 0 || inverse[r] > 0.0;
    EXPECT_EQ(s.largest.view().as<float>()[r], asks ? expected.largest : -kInf);
    EXPECT_NEAR(s.sum.view().as<double>()[r], expected.sum, expected.sum * 20 * 0x1p-24);
    std::vector<int32_t> got(columns, columns + counts[r]);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), again.columns.view().row<int32_t>(r)))
        << "another order in another run";
    std::vector<int32_t> best = expected.columns;
    std::sort(got.begin(), got.end());
    std::sort(best.begin(), best.end());
    EXPECT_EQ(got, best);
    for (int64_t i = counts[r]; i < kRoom; ++i) {
      EXPECT_EQ(columns[i], -1);
      EXPECT_EQ(scores[i], -kInf);
    }
  }
}

TEST_P(SamplingTest, PenaltiesChangeTheirPlacesAlone) {
  const std::vector<float> logits = RandomRow(2 * 50, 9, 4.0);
  const Tensor device_logits = Upload(logits, {2, 50}), before = device_.Zeros(DType::kF32, {5});
  // There is room for two that are not there.
  const std::vector<int32_t> places = {0, 3, 1, 49, 1, 0, 0, 7, 1000, 1000};
  const std::vector<float> amounts = {1.3f, 0.0f, 1.0f, 0.5f, 0.7f, -2.0f, 9.0f, 9.0f, 9.0f, 9.0f};
  PenalizeLogits(stream(), device_logits.view(), device_.From(std::vector<int32_t>{3}).view(),
                 Upload(places, {5, 2}).view(), Upload(amounts, {5, 2}).view(), before.view());
  std::vector<double> expected(logits.begin(), logits.end());
  std::vector<reference::Penalty> penalties;
  for (int i = 0; i < 3; ++i) {
    penalties.push_back({places[2 * i], places[2 * i + 1], amounts[2 * i], amounts[2 * i + 1]});
  }
  std::vector<double> were = reference::PenalizeLogits(penalties, 50, &expected);
  were.resize(5, 0.0);
  EXPECT_EQ(ToDoubles(before.view()), were);
  const std::vector<double> got = ToDoubles(device_logits.view());
  for (int i = 0; i < 100; ++i) {
    const bool penalised = i == 3 || i == 99 || i == 50;
    // A product or quotient and a difference, of at most 4 / 0.7 in magnitude, round to fp32.
    EXPECT_NEAR(got[i], expected[i], penalised ? 2 * 6.0 * 0x1p-24 : 0.0) << i;
  }
}

TEST_P(SamplingTest, DrawsAreTheLargestKeys) {
  constexpr int64_t kRows = 12, kN = 3000, kFirst = 128000;
  std::vector<float> flat;
  std::vector<int64_t> seeds;
  std::vector<double> limits;
  std::vector<float> largest;
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<float> row = RandomRow(kN, 50 + r, r % 3 == 0 ? 0.1 : 12.0);
    flat.insert(flat.end(), row.begin(), row.end());
    if (r == 4) flat[r * kN + 17] = kNan;
    seeds.insert(seeds.end(), {static_cast<int64_t>(r * 0x9E3779B97F4A7C15), 7 + r});
    limits.insert(limits.end(),
                  {r == 5 ? 0.0 : 0.4 + 0.3 * static_cast<double>(r), r == 6   ? -6.0
                                                                      : r == 7 ? -1.0
                                                                               : -kInf});
    // Nothing reaches row 7's; without a margin it may be anything.
    largest.push_back(r == 6 ? 8.0f : r == 7 ? 1001.0f : r % 2 == 0 ? -kInf : 3.0f);
  }
  const Tensor logits = Upload(flat, {kRows, kN}), keys = device_.Zeros(DType::kF64, {kRows}),
               scores = device_.Zeros(DType::kF32, {kRows}),
               columns = device_.Zeros(DType::kI32, {kRows});
  DrawTokens(stream(), logits.view(), Upload(seeds, {kRows, 2}).view(),
             Upload(limits, {kRows, 2}).view(), Upload(largest, {kRows}).view(), kFirst,
             keys.view(), scores.view(), columns.view());
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<double> row(flat.begin() + r * kN, flat.begin() + (r + 1) * kN);
    const reference::Draw expected = reference::DrawToken(
        row, static_cast<uint64_t>(seeds[2 * r]), static_cast<uint64_t>(seeds[2 * r + 1]),
        limits[2 * r], largest[r] + limits[2 * r + 1], kFirst);
    EXPECT_EQ(columns.view().as<int32_t>()[r], expected.column) << "row " << r;
    if (expected.column < 0) {
      EXPECT_EQ(keys.view().as<double>()[r], -kInf);
    } else {
      EXPECT_NEAR(keys.view().as<double>()[r], expected.key, 1e-12 * std::abs(expected.key));
      EXPECT_EQ(scores.view().as<float>()[r], row[expected.column]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, SamplingTest, ::testing::ValuesIn(DeviceCases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace trireme
