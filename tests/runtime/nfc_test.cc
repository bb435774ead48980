#include "runtime/nfc.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

TEST(NfcTest, ComposesInCanonicalOrder) {
  EXPECT_EQ(ToNfc("plain ASCII\n"), "plain ASCII\n");
  EXPECT_EQ(ToNfc("e\u0301"), "\u00E9");
  EXPECT_EQ(ToNfc("\u00E9"), "\u00E9");
  EXPECT_EQ(ToNfc("\u212B"), "\u00C5");                // singleton
  EXPECT_EQ(ToNfc("q\u0307\u0323"), "q\u0323\u0307");  // ordered, nothing to compose
  EXPECT_EQ(ToNfc("d\u0307\u0323"), "\u1E0D\u0307");   // ordered first, then composed
  EXPECT_EQ(ToNfc("\u1E0B\u0323"), "\u1E0D\u0307");
  EXPECT_EQ(ToNfc("e\u0301\u0301"),
            "\u00E9\u0301");  // the second is blocked by nothing, but nothing composes
  EXPECT_EQ(ToNfc("a\u0332\u0301"), "\u00E1\u0332");  // a mark of a lower class does not block
  EXPECT_EQ(ToNfc("\u0301a"), "\u0301a");             // no starter in front
  EXPECT_EQ(ToNfc("\u0958"), "\u0915\u093C");         // composition exclusion
  EXPECT_EQ(ToNfc("\u0344"), "\u0308\u0301");         // decomposes to non-starters
  EXPECT_EQ(ToNfc("\uF900"), "\u8C48");               // CJK compatibility ideograph
}

TEST(NfcTest, ComposesHangul) {
  EXPECT_EQ(ToNfc("\u1100\u1161"), "\uAC00");
  EXPECT_EQ(ToNfc("\u1100\u1161\u11A8"), "\uAC01");
  EXPECT_EQ(ToNfc("\uAC00\u11A8"), "\uAC01");
  EXPECT_EQ(ToNfc("\uAC01\u11A8"), "\uAC01\u11A8");  // has its trailing consonant
  EXPECT_EQ(ToNfc("\u1100\u1100\u1161"), "\u1100\uAC00");
}

}  // namespace
}  // namespace trireme
