// e4m3 against its definition, all codes, and every row's scale and rounding.
#include "kernels/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The format as its standard says it.
double ValueOf(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code >= 128 ? -magnitude : magnitude;
}
bool IsNan(int code) { return (code & 0x7f) == 0x7f; }
E4M3 Code(int bits) { return E4M3{static_cast<uint8_t>(bits)}; }

// The nearest of all codes with the number's sign; of two the even one.
int NearestCode(double x) {
  const int sign = std::signbit(x) ? 128 : 0;
  int best = sign;
  for (int code = sign; !IsNan(code); ++code) {
    const double distance = std::abs(ValueOf(code) - x), before = std::abs(ValueOf(best) - x);
    if (distance < before || (distance == before && code % 2 == 0)) best = code;
  }
  return best;
}

TEST(E4M3Test, AllCodesAreTheirValuesAndComeBack) {
  for (int code = 0; code < 256; ++code) {
    const float value = ToFloat(Code(code));
    if (IsNan(code)) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      EXPECT_EQ(value, ValueOf(code)) << code;
      EXPECT_EQ(std::signbit(value), code >= 128) << code;
    }
    EXPECT_EQ(FromFloat<E4M3>(value).bits, code);
  }
}

TEST(E4M3Test, TiesGoToEvenAndTheirNeighboursDoNot) {
  for (int code = 0; code < 0x7e; ++code) {
    const auto tie = static_cast<float>((ValueOf(code) + ValueOf(code + 1)) / 2);
    EXPECT_EQ(FromFloat<E4M3>(tie).bits, code + code % 2) << code;
    EXPECT_EQ(FromFloat<E4M3>(std::nextafter(tie, 0.0f)).bits, code);
    EXPECT_EQ(FromFloat<E4M3>(std::nextafter(tie, kInfinity)).bits, code + 1);
    EXPECT_EQ(FromFloat<E4M3>(-tie).bits, 128 + code + code % 2);
  }
}

TEST(E4M3Test, EveryBf16AndF16BecomesTheNearestCode) {
  for (int bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    for (const float x : {ToFloat(BF16{pattern}), ToFloat(std::bit_cast<F16>(pattern))}) {
      if (std::isnan(x)) {
        ASSERT_TRUE(IsNan(FromFloat<E4M3>(x).bits)) << bits;
      } else {
        ASSERT_EQ(FromFloat<E4M3>(x).bits, NearestCode(std::clamp(double{x}, -1e6, 1e6))) << x;
      }
    }
  }
}

TEST(E4M3Test, WhatIsTooLargeBecomesTheLargest) {
  for (const float x : {448.0f, 449.0f, 464.0f, 480.0f, 1e9f, 3.4e38f, kInfinity}) {
    EXPECT_EQ(FromFloat<E4M3>(x).bits, 0x7e) << x;
    EXPECT_EQ(FromFloat<E4M3>(-x).bits, 0xfe) << x;
  }
}

TEST(QuantizeTest, TheMaximumOfARowOfAnyLength) {
  for (int64_t n = 1; n <= 67; ++n) {
    std::vector<float> row(n);
    for (int64_t i = 0; i < n; ++i)
      row[i] = static_cast<float>(RandomValue(static_cast<uint64_t>(n), static_cast<uint64_t>(i)));
    for (int64_t at = 0; at < n; ++at) {
      std::vector<float> changed = row;
      changed[at] = -7.5f;
      EXPECT_EQ(RowMaximum(changed.data(), n), 7.5f);
      for (const float bad : {std::nanf(""), -std::nanf(""), kInfinity, -kInfinity}) {
        changed[at] = bad;
        EXPECT_FALSE(std::isfinite(RowMaximum(changed.data(), n))) << n << ", " << at;
      }
    }
  }
  const float zeros[3] = {0.0f, -0.0f, 0.0f};
  EXPECT_EQ(RowMaximum(zeros, 3), 0.0f);
}

// Each element within half the distance of codes around it; the largest is +-448.
TEST(QuantizeTest, RowsAreRoundedToTheirScale) {
  for (const double magnitude : {1.0, 1e-3, 448.0, 3e38, 1e-30, 1e-37, 1e-42}) {
    for (int64_t n : {1, 2, 15, 16, 17, 64, 1000}) {
      std::vector<float> row(n);
      for (int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<uint64_t>(i);
        // Over more than the format's 18 powers of two.
        row[i] = static_cast<float>(magnitude *
                                    std::ldexp(RandomValue(9, at), -static_cast<int>(at % 23)));
      }
      const float scale = ScaleOfRow(RowMaximum(row.data(), n));
      ASSERT_GE(scale, 0x1p-118f);
      std::vector<E4M3> codes(n);
      QuantizeRow(row.data(), n, scale, codes.data());
      for (int64_t i = 0; i < n; ++i) {
        const double q = ToFloat(codes[i]), exact = row[i] / double{scale};
        const double distance =
            std::max(std::ldexp(1.0, -9), std::exp2(std::floor(std::log2(std::abs(exact))) - 3));
        ASSERT_LE(std::abs(q - exact), distance / 2 * (1 + 0x1p-20)) << magnitude << ", " << i;
        const bool largest = std::abs(row[i]) == RowMaximum(row.data(), n);
        if (largest && scale > 0x1p-118f) {
          ASSERT_EQ(std::abs(q), 448.0);
        }
      }
    }
  }
}

TEST(QuantizeTest, ARowOfZerosStaysOne) {
  const float zeros[20] = {};
  E4M3 codes[20];
  QuantizeRow(zeros, 20, ScaleOfRow(0.0f), codes);
  for (const E4M3 code : codes) EXPECT_EQ(code.bits, 0);
}

// What kernels multiply with is the half-precision number of the code's bits.
TEST(ActivationsTest, TheScaleIsTheSmallestPowerOfTwo) {
  EXPECT_EQ(ActivationScale(448.0f), 1.0f);
  EXPECT_EQ(ActivationScale(std::nextafter(448.0f, kInfinity)), 2.0f);
  EXPECT_EQ(ActivationScale(0.0f), 0x1p-112f);
  for (int exponent = -149; exponent < 127; ++exponent) {
    for (const float mantissa : {1.0f, 1.25f, 1.75f, 1.7500001f, 1.9999999f}) {
      const float maximum = std::ldexp(mantissa, exponent), scale = ActivationScale(maximum);
      int power;
      ASSERT_EQ(std::frexp(scale, &power), 0.5f) << "no power of two";
      ASSERT_LE(maximum, 448.0 * scale);
      ASSERT_TRUE(scale == 0x1p-112f || maximum > 224.0 * scale) << maximum;
    }
  }
}

TEST(ActivationsTest, WhatIsNotFiniteOrRoundsToItStaysVisible) {
  const float largest = std::numeric_limits<float>::max(), rounds_up = 0x1.fp127f;
  for (const float bad : {kInfinity, -kInfinity, std::nanf(""), largest, -rounds_up}) {
    std::vector<float> row(40, 1.0f);
    row[17] = bad;
    RoundActivations(row.data(), 40);
    for (const float x : row) ASSERT_TRUE(std::isnan(x)) << bad;
  }
  std::vector<float> row(40, 1.0f);
  row[17] = std::nextafter(rounds_up, 0.0f);
  RoundActivations(row.data(), 40);
  EXPECT_EQ(row[17], 0x1.ep127f);
  EXPECT_EQ(row[0], 0.0f) << "far below";
}

TEST(ActivationsTest, RowsAreThoseOfTheNaiveTwin) {
  for (const double magnitude : {1.0, 448.0, 65504.0, 1e38, 1e-20, 1e-31, 1e-37, 0.0}) {
    for (const int64_t n : {1, 15, 16, 17, 1000}) {
      std::vector<float> row(n);
      for (int64_t i = 0; i < n; ++i)
        row[i] =
            static_cast<float>(magnitude * std::ldexp(RandomValue(31, static_cast<uint64_t>(i)),
                                                      -static_cast<int>(i % 23)));
      const std::vector<double> expected = reference::RoundActivations({row.begin(), row.end()}, n);
      RoundActivations(row.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(row[i], expected[i]) << magnitude << ", " << i;
        ASSERT_EQ(ToFloat(FromFloat<BF16>(row[i])), row[i]) << "exact in bf16";
      }
    }
  }
}

// What tensor parallelism cuts: each piece has a scale of its own.
TEST(ActivationsTest, PiecesOfARowAreRoundedLikeTheWhole) {
  constexpr int64_t kN = 512;
  std::vector<float> whole(kN), pieces(kN);
  for (int64_t i = 0; i < kN; ++i) {
    const double piece = i < kN / 2 ? 1.0 : 1.0 / 37.0;
    whole[i] = static_cast<float>(
        piece * std::ldexp(RandomValue(32, static_cast<uint64_t>(i)), -static_cast<int>(i % 20)));
  }
  pieces = whole;
  const std::vector<float> exact = whole;
  const float maximum = RowMaximum(whole.data(), kN);
  RoundActivations(whole.data(), kN);
  RoundActivations(pieces.data(), kN / 2);
  RoundActivations(pieces.data() + kN / 2, kN / 2);
  for (int64_t i = 0; i < kN; ++i) {
    if (std::abs(exact[i]) >= maximum * 0x1p-13f) {
      ASSERT_EQ(pieces[i], whole[i]) << i;
    } else {
      ASSERT_NEAR(pieces[i], whole[i], maximum * 0x1p-17f) << i;
    }
  }
}

TEST(QuantizeTest, ShiftedCodesAreHalvesOfA256thPart) {
  for (int code = 0; code < 256; ++code) {
    if (IsNan(code)) continue;
    const auto half =
        std::bit_cast<F16>(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
    EXPECT_EQ(ToFloat(half) * kKernelScale, ToFloat(Code(code)));
  }
}

}  // namespace
}  // namespace trireme
