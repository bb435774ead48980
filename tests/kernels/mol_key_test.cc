// Keys of answers: a score and its item's place in the table's total order.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <iterator>

#include "kernels/mol_ops.h"

namespace trireme {
namespace {

TEST(MolKeyTest, OrdersAsScoreThenPlace) {
  const float scores[] = {-INFINITY, -1e30f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 20.0f, INFINITY};
  for (size_t a = 0; a + 1 < std::size(scores); ++a) {
    EXPECT_LT(MolKey(scores[a], 0), MolKey(scores[a + 1], UINT32_MAX));
    EXPECT_GT(MolKey(scores[a], 4), MolKey(scores[a], 5));
    EXPECT_EQ(MolKeyScore(MolKey(scores[a], 77)), scores[a]);
  }
  EXPECT_EQ(MolKey(-0.0f, 3), MolKey(0.0f, 3));
}

}  // namespace
}  // namespace trireme
