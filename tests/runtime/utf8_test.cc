#include "runtime/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace trireme {
namespace {

TEST(Utf8Test, EveryCodePointRoundTrips) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(c, text);
    size_t offset = 0;
    ASSERT_EQ(NextUtf8(text, offset), c);
    ASSERT_EQ(offset, text.size());
    ASSERT_EQ(FindInvalidUtf8(text), std::string::npos) << static_cast<uint32_t>(c);
  }
}

// Table 3-8 of the Unicode standard and its neighbours; R stands for U+FFFD.
TEST(Utf8Test, EachMaximalSubpartBecomesOneReplacement) {
  struct Case {
    std::string bytes;
    size_t first_invalid;
    std::string replaced;
  };
  const std::vector<Case> cases = {
      {"\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64", 1, "aRRRbRcRRd"},
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", 0, "RRRRRRRRA"},  // overlong forms
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", 0, "RRRRRRRRA"},  // surrogates
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", 0, "RRRRRARRB"},  // above U+10FFFF
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", 0, "RRRRA"},      // cut short
      {"\xC3", 0, "R"},
      {"e\xE2\x82", 1, "eR"},
      {"\xF0\x9F\x98", 0, "R"},
      {"12345678\xFF"
       "12345678",
       8, "12345678R12345678"},
      {"", std::string::npos, ""},
  };
  for (const Case& c : cases) {
    std::string expected;
    for (char letter : c.replaced)
      expected += letter == 'R' ? "\xEF\xBF\xBD" : std::string(1, letter);
    EXPECT_EQ(FindInvalidUtf8(c.bytes), c.first_invalid) << c.replaced;
    EXPECT_EQ(ReplaceInvalidUtf8(c.bytes), expected) << c.replaced;
  }
}

// Bytes that make every kind of accident likely.
std::string RandomBytes(std::mt19937& random) {
  static const std::string kBytes =
      "a \x80\x9F\xA0\xBF\xC2\xC3\xE0\xE2\xED\xEF\xF0\xF4\xF5\xFF\x82\xAC";
  std::string text(random() % 12, ' ');
  for (char& c : text) c = kBytes[random() % kBytes.size()];
  return text;
}

// The suffix is what must wait: replacing what is before it now and the rest later changes nothing.
TEST(Utf8Test, CuttingBeforeTheIncompleteSuffixChangesNothing) {
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    const std::string head = RandomBytes(random);
    const std::string tail = RandomBytes(random);
    const size_t keep = head.size() - IncompleteUtf8Suffix(head);
    ASSERT_LE(head.size() - keep, 3u);
    EXPECT_EQ(
        ReplaceInvalidUtf8(head.substr(0, keep)) + ReplaceInvalidUtf8(head.substr(keep) + tail),
        ReplaceInvalidUtf8(head + tail));
  }
  EXPECT_EQ(IncompleteUtf8Suffix("a\xF0\x9F\x98"), 3u);
  EXPECT_EQ(IncompleteUtf8Suffix("a\xE2\x82"), 2u);
  EXPECT_EQ(IncompleteUtf8Suffix("a\xC3"), 1u);
  EXPECT_EQ(IncompleteUtf8Suffix("\xC3\xA9"), 0u);
  EXPECT_EQ(IncompleteUtf8Suffix("\xED\xA0"), 0u);  // the beginning of nothing
}

}  // namespace
}  // namespace trireme
