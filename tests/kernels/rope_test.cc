#include <cmath>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class RopeTest : public KernelTest {
 protected:
  Tensor Angles(int64_t positions, int64_t head_dim) {
    Tensor table = device_.Zeros(DType::kF32, {positions, head_dim});
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t i = 0; i < head_dim / 2; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(i) / head_dim);
        table.view().row<float>(p)[i] = static_cast<float>(std::cos(angle));
        table.view().row<float>(p)[head_dim / 2 + i] = static_cast<float>(std::sin(angle));
      }
    }
    return table;
  }
  void CompareWithReference(const reference::Heads& heads, int64_t page_size, bool norm);
};

void RopeTest::CompareWithReference(const reference::Heads& heads, int64_t page_size, bool norm) {
  const int64_t d = heads.head_dim, width = (heads.q_heads + 2 * heads.kv_heads) * d, pages = 6;
  const std::vector<int32_t> positions = {0, 5, 63, 1, 17};
  const std::vector<int64_t> slots = {pages * page_size - 1, 0, -1, page_size, page_size - 1};
  const Tensor wide = device_.Random(dtype(), {5, width + 3}, 1), angles = Angles(64, d);
  const TensorView qkv = wide.view().Columns(3, width);
  const Tensor k = device_.Random(dtype(), {pages, page_size, heads.kv_heads, d}, 2);
  const Tensor v = device_.Random(dtype(), {pages, page_size, heads.kv_heads, d}, 3);
  const Tensor q_norm = device_.Random(dtype(), {d}, 4), k_norm = device_.Random(dtype(), {d}, 5);

  reference::Doubles expected = ToDoubles(qkv);
  reference::Cache cache{page_size, ToDoubles(k.view()), ToDoubles(v.view())};
  const reference::Doubles none;
  reference::RopeAndStoreKv(heads, positions, slots, ToDoubles(angles.view()),
                            norm ? ToDoubles(q_norm.view()) : none,
                            norm ? ToDoubles(k_norm.view()) : none, 1e-6, &expected, &cache);

  RopeParams rope{angles.view(), {}, {}, 1e-6f};
  if (norm) rope.q_norm = q_norm.view(), rope.k_norm = k_norm.view();
  const Tensor position_tensor = device_.From(positions), slot_tensor = device_.From(slots);
  RopeAndStoreKv(stream(), qkv, position_tensor.view(), slot_tensor.view(), rope, heads.q_heads,
                 {k.view(), v.view(), {}});
  // Two products of up to sqrt(d) each when normalised; d terms in the norm's sum of squares.
  const double magnitude = norm ? 2 * std::sqrt(static_cast<double>(d)) : 2.0;
  ExpectClose(qkv, expected, norm ? d + 8 : 3, magnitude);
  ExpectClose(k.view(), cache.k, norm ? d + 8 : 3, magnitude);
  EXPECT_EQ(ToDoubles(v.view()), cache.v);
}

TEST_P(RopeTest, EqualsTheUnfusedReference) {
  for (bool norm : {false, true}) {
    CompareWithReference({1, 1, 2}, 1, norm);
    CompareWithReference({4, 2, 8}, 4, norm);
    CompareWithReference({6, 3, 34}, 16, norm);
    CompareWithReference({8, 2, 64}, 3, norm);
    CompareWithReference({4, 4, 128}, 16, norm);
  }
}

TEST_P(RopeTest, PositionZeroChangesNothing) {
  const Tensor qkv = device_.Random(dtype(), {1, 3 * 16}, 6),
               copy = device_.Random(dtype(), {1, 3 * 16}, 6);
  const Tensor k = device_.Zeros(dtype(), {1, 1, 1, 16}), v = device_.Zeros(dtype(), {1, 1, 1, 16});
  const Tensor angles = Angles(1, 16), position = device_.From(std::vector<int32_t>{0});
  const Tensor slot = device_.From(std::vector<int64_t>{0});
  RopeAndStoreKv(stream(), qkv.view(), position.view(), slot.view(), {angles.view(), {}, {}, 0}, 1,
                 {k.view(), v.view(), {}});
  ExpectSameBits(qkv.view(), copy.view());
  EXPECT_EQ(ToDoubles(k.view()), ToDoubles(copy.view().Columns(16, 16)));
  EXPECT_EQ(ToDoubles(v.view()), ToDoubles(copy.view().Columns(32, 16)));
}

INSTANTIATE_TEST_SUITE_P(Devices, RopeTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
