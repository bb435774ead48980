#include "models/float_convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

namespace trireme {
namespace {

// All 65536 values of each 16-bit type, through the vector path, against the scalar definition.
TEST(FloatConvertTest, EverySixteenBitValue) {
  std::vector<uint16_t> bits(65536), back(65536);
  std::iota(bits.begin(), bits.end(), uint16_t{0});
  std::vector<float> wide(65536);
  for (const DType type : {DType::kBF16, DType::kF16}) {
    ConvertFloats(type, bits.data(), DType::kF32, wide.data(), 65536);
    ConvertFloats(DType::kF32, wide.data(), type, back.data(), 65536);
    for (int i = 0; i < 65536; ++i) {
      const float expected = type == DType::kBF16 ? ToFloat(std::bit_cast<BF16>(bits[i]))
                                                  : ToFloat(std::bit_cast<F16>(bits[i]));
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(wide[i])) << i;
        continue;
      }
      ASSERT_EQ(wide[i], expected) << i;
      ASSERT_EQ(back[i], bits[i]) << Name(type);
    }
  }
}

TEST(FloatConvertTest, RoundsToNearestEven) {
  // 2^-11 and 2^-8 are half a unit in the last place of F16 and BF16 at 1; nine elements reach past
  // the vector loop.
  const std::vector<float> halves16 = {1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 1.0f + 0x1.1p-11f, 1e6f,
                                       -1e6f,           0x1p-25f,        0x1.1p-25f,        -0.0f,
                                       1.0f + 0x3p-11f};
  std::vector<F16> f16(9);
  ConvertFloats(DType::kF32, halves16.data(), DType::kF16, f16.data(), 9);
  for (int i = 0; i < 9; ++i) {
    EXPECT_EQ(std::bit_cast<uint16_t>(f16[i]), std::bit_cast<uint16_t>(FromFloat<F16>(halves16[i])))
        << i;
  }
  EXPECT_EQ(std::bit_cast<uint16_t>(f16[0]), 0x3c00);
  EXPECT_EQ(std::bit_cast<uint16_t>(f16[1]), 0x3c02);
  EXPECT_EQ(std::bit_cast<uint16_t>(f16[8]), 0x3c02);
  const std::vector<float> halves8 = {1.0f + 0x1p-8f, 1.0f + 0x3p-8f};
  std::vector<BF16> bf16(2);
  ConvertFloats(DType::kF32, halves8.data(), DType::kBF16, bf16.data(), 2);
  EXPECT_EQ(bf16[0].bits, 0x3f80);
  EXPECT_EQ(bf16[1].bits, 0x3f82);
}

}  // namespace
}  // namespace trireme
