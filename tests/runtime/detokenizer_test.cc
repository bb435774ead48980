#include <gtest/gtest.h>

#include <random>

#include "runtime/tokenizer.h"
#include "runtime/utf8.h"
#include "tests/runtime/tokenizer_files.h"

namespace trireme {
namespace {

class DetokenizerStreamTest : public testing::TestWithParam<std::string> {};

TEST_P(DetokenizerStreamTest, JoinedPiecesAreTheDecodedText) {
  const auto tokenizer = OpenTokenizer(GetParam());
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(3);
  for (int round = 0; round < 400; ++round) {
    const bool skip_special = random() % 2 == 0;
    // Half of the rounds draw from the low ids: specials and byte tokens, so that characters fall
    // apart.
    const int64_t range = round % 2 == 0 ? 260 : tokenizer->vocab_size() + 1;
    std::vector<TokenId> ids(random() % 40);
    for (TokenId& id : ids) id = static_cast<TokenId>(random() % range);
    Detokenizer detokenizer(*tokenizer, /*at_text_start=*/true, skip_special);
    std::string joined;
    for (size_t i = 0; i <= ids.size(); ++i) {
      const std::string piece = i < ids.size() ? detokenizer.Append(ids[i]) : detokenizer.Finish();
      EXPECT_EQ(FindInvalidUtf8(piece), std::string::npos);
      joined += piece;
    }
    EXPECT_EQ(joined, tokenizer->Decode(ids, skip_special));
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, DetokenizerStreamTest,
                         testing::Values(kStoriesJson, kStoriesModel, FixturePath("gpt2"),
                                         FixturePath("llama3"), FixturePath("qwen"),
                                         FixturePath("mistral"), FixturePath("metaspace")));

TEST(DetokenizerTest, HoldsBackIncompleteCharacters) {
  const auto tokenizer = OpenTokenizer(kStoriesJson);
  const auto byte = [](int value) { return TokenId{3 + value}; };
  Detokenizer detokenizer(*tokenizer);
  EXPECT_EQ(detokenizer.Append(byte(0xF0)), "");
  EXPECT_EQ(detokenizer.Append(byte(0x9F)), "");
  EXPECT_EQ(detokenizer.Append(byte(0x98)), "");
  EXPECT_EQ(detokenizer.Append(byte(0x80)), "\U0001F600");
  EXPECT_EQ(detokenizer.Append(byte(0xE2)), "");
  EXPECT_EQ(detokenizer.Append(403), "\uFFFD Once");  // no continuation: given up at once
  EXPECT_EQ(detokenizer.Append(byte(0xE2)), "");
  EXPECT_EQ(detokenizer.Append(byte(0x82)), "");
  EXPECT_EQ(detokenizer.Finish(), "\uFFFD");
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST(DetokenizerTest, StripsTheDummySpaceOnlyAtTheStartOfAText) {
  for (const char* path : {kStoriesJson, kStoriesModel}) {
    const auto tokenizer = OpenTokenizer(path);
    Detokenizer start(*tokenizer, /*at_text_start=*/true);
    EXPECT_EQ(start.Append(1), "");  // <s> is skipped and does not count as the start
    EXPECT_EQ(start.Append(403), "Once");
    EXPECT_EQ(start.Append(407), " upon");
    Detokenizer middle(*tokenizer, /*at_text_start=*/false);
    EXPECT_EQ(middle.Append(403), " Once");
    Detokenizer shown(*tokenizer, /*at_text_start=*/true, /*skip_special_tokens=*/false);
    EXPECT_EQ(shown.Append(1), "<s>");
    EXPECT_EQ(shown.Append(403), " Once");
  }
}

}  // namespace
}  // namespace trireme
