#include "launch/prompts.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

TEST(ParseTokenIdsTest, SeparatorsBetweenIds) {
  const std::vector<TokenId> ids = {1, 5, 2147483647};
  for (const char* text : {"1,5,2147483647", "1 5 2147483647", "[1, 5, 2147483647]\n",
                           "\r\n1\t5\r\n\r\n2147483647,", "01,5,2147483647"}) {
    EXPECT_EQ(*ParseTokenIds("f", text), ids) << text;
  }
  EXPECT_TRUE(ParseTokenIds("f", "")->empty());
  EXPECT_TRUE(ParseTokenIds("f", " \n[]")->empty());
}

// Ids behind a NUL were left out in silence, and 1+5 was two ids.
TEST(ParseTokenIdsTest, WhatIsNoIdIsNamedWithItsPlace) {
  using std::string_literals::operator""s;
  const std::pair<std::string, std::string> cases[] = {
      {"1,2\n3,4\0,5"s, "\"4\\x00\" is not a token id (line 2, byte 3)"},
      {"\0"s, "\"\\x00\" is not a token id (line 1, byte 1)"},
      {"1+5", "\"1+5\" is not a token id (line 1, byte 1)"},
      {"1,+5", "\"+5\" is not a token id (line 1, byte 3)"},
      {"-1", "\"-1\" is not a token id (line 1, byte 1)"},
      {"-0", "\"-0\" is not a token id (line 1, byte 1)"},
      {"1;5", "\"1;5\" is not a token id (line 1, byte 1)"},
      {"1\n\n 2.5", "\"2.5\" is not a token id (line 3, byte 2)"},
      {"0x10", "\"0x10\" is not a token id (line 1, byte 1)"},
      {"2147483648", "\"2147483648\" is not a token id (line 1, byte 1)"},
      {"1 99999999999999999999999999",
       "\"99999999999999999999\" is not a token id (line 1, byte 3)"},
  };
  for (const auto& [text, what] : cases) {
    EXPECT_EQ(std::string(ParseTokenIds("ids.txt", text).status().message()),
              "ids.txt: " + what + "; write them as 1,5,9");
  }
}

}  // namespace
}  // namespace trireme
