#include "parallel/rank_sum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace trireme {
namespace {

template <typename T>
class RankSumTest : public testing::Test {};
// A tag per element type: _Float16 itself has no typeinfo to name a test by.
template <typename T>
struct Element {
  using Type = T;
};
using FloatTypes = testing::Types<Element<float>, Element<BF16>, Element<F16>>;
TYPED_TEST_SUITE(RankSumTest, FloatTypes);

template <typename T>
std::vector<T> RandomValues(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<T> values(n);
  for (T& value : values) {
    const float unit = static_cast<float>(rng()) / 4294967296.0f - 0.5f;
    value = FromFloat<T>(std::ldexp(unit, static_cast<int>(rng() % 16) - 4));
  }
  return values;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

TYPED_TEST(RankSumTest, IsTheFloatSumInTheOrderGiven) {
  using T = typename TypeParam::Type;
  for (int ranks : {1, 2, 3, 5}) {
    for (int64_t n : {0, 1, 7, 8, 511, 512, 513, 5000}) {
      std::vector<std::vector<T>> inputs;
      std::vector<const void*> pointers;
      for (int r = 0; r < ranks; ++r) inputs.push_back(RandomValues<T>(n, 100 * r + 1));
      for (const auto& input : inputs) pointers.push_back(input.data());
      std::vector<T> want(n);
      for (int64_t i = 0; i < n; ++i) {
        float sum = ToFloat(inputs[0][i]);
        for (int r = 1; r < ranks; ++r) sum += ToFloat(inputs[r][i]);
        want[i] = FromFloat<T>(sum);
      }
      std::vector<T> out(n);
      SumInOrder(kDTypeOf<T>, pointers, n, out.data());
      EXPECT_TRUE(SameBits(out, want)) << ranks << " x " << n;
      // In place of any of the inputs.
      const int last = ranks - 1;
      SumInOrder(kDTypeOf<T>, pointers, n, inputs[last].data());
      EXPECT_TRUE(SameBits(inputs[last], want));
    }
  }
}

TYPED_TEST(RankSumTest, EveryValueOfSixteenBitsSurvives) {
  using T = typename TypeParam::Type;
  if (sizeof(T) != 2) GTEST_SKIP() << "16-bit types only";
  std::vector<uint16_t> in(65536), zeros(65536), out(65536);
  for (int i = 0; i < 65536; ++i) in[i] = static_cast<uint16_t>(i);
  const void* inputs[] = {in.data(), zeros.data()};
  SumInOrder(kDTypeOf<T>, inputs, 65536, out.data());
  for (int i = 0; i < 65536; ++i) {
    T before, after;
    std::memcpy(&before, &in[i], 2);
    std::memcpy(&after, &out[i], 2);
    if (std::isnan(ToFloat(before))) {
      EXPECT_TRUE(std::isnan(ToFloat(after))) << i;
    } else {
      EXPECT_EQ(ToFloat(before), ToFloat(after)) << i;  // -0 + 0 is +0
    }
  }
}

}  // namespace
}  // namespace trireme
