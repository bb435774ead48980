#include "runtime/tokenizer_bpe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace trireme {
namespace {

using Ids = std::vector<TokenId>;

// The definition: as long as there is a pair to merge, merge the leftmost of the lowest rank.
Ids NaiveEncode(const Bpe::Vocab& vocab, const Bpe::Merges& merges, const std::string& word) {
  std::vector<std::string> parts;
  for (char c : word) parts.emplace_back(1, c);
  while (true) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t at = 0; at + 1 < parts.size(); ++at) {
      const auto found =
          std::find(merges.begin(), merges.end(), std::pair(parts[at], parts[at + 1]));
      const size_t rank = found - merges.begin();
      if (rank < best_rank) best_rank = rank, best_at = at;
    }
    if (best_rank == merges.size()) break;
    parts[best_at] += parts[best_at + 1];
    parts.erase(parts.begin() + best_at + 1);
  }
  Ids ids;
  for (const std::string& part : parts) {
    ids.push_back(std::find_if(vocab.begin(), vocab.end(), [&](const auto& v) {
                    return v.first == part;
                  })->second);
  }
  return ids;
}

TEST(BpeTest, EqualsTheNaiveProcedure) {
  std::mt19937 random(5);
  for (int round = 0; round < 40; ++round) {
    Bpe::Vocab vocab;
    Bpe::Merges merges;
    for (TokenId id = 0; id < 3; ++id)
      vocab.emplace_back(std::string(1, static_cast<char>('a' + id)), id);
    while (merges.size() < 25) {
      const std::string left = vocab[random() % vocab.size()].first;
      const std::string right = vocab[random() % vocab.size()].first;
      if (std::find(merges.begin(), merges.end(), std::pair(left, right)) != merges.end()) continue;
      merges.emplace_back(left, right);
      const std::string both = left + right;
      if (std::none_of(vocab.begin(), vocab.end(),
                       [&](const auto& v) { return v.first == both; })) {
        vocab.emplace_back(both, static_cast<TokenId>(vocab.size()));
      }
    }
    const auto bpe = Bpe::Build(vocab, merges, BpeOptions());
    ASSERT_TRUE(bpe.ok()) << bpe.status();
    for (int i = 0; i < 50; ++i) {
      std::string word(random() % 40, 'a');
      for (char& c : word) c = static_cast<char>('a' + random() % 3);
      Ids ids;
      bpe->EncodeWord(word, ids);
      EXPECT_EQ(ids, NaiveEncode(vocab, merges, word)) << word;
    }
  }
}

Ids Encode(const BpeOptions& options, const std::string& word) {
  const Bpe::Vocab vocab = {{"?", 0},      {"a", 1},      {"b", 2},  {"ab", 3},
                            {"<0xC3>", 4}, {"<0xA9>", 5}, {"aba", 6}};
  const auto bpe = Bpe::Build(vocab, {{"a", "b"}}, options);
  EXPECT_TRUE(bpe.ok()) << bpe.status();
  Ids ids;
  bpe->EncodeWord(word, ids);
  return ids;
}

TEST(BpeTest, UnknownCharacters) {
  EXPECT_EQ(Encode({}, "axyb"), Ids({3}));  // dropped: what is left are neighbours
  EXPECT_EQ(Encode({.unk_token = "?"}, "axyb"), Ids({1, 0, 0, 2}));
  EXPECT_EQ(Encode({.unk_token = "?", .fuse_unk = true}, "axybz"), Ids({1, 0, 2, 0}));
  // Bytes only where the vocabulary has all those of the character.
  EXPECT_EQ(Encode({.unk_token = "?", .byte_fallback = true}, "a\u00E9\u00E8"), Ids({1, 4, 5, 0}));
}

TEST(BpeTest, IgnoreMergesTakesWholeWords) {
  EXPECT_EQ(Encode({}, "aba"), Ids({3, 1}));
  EXPECT_EQ(Encode({.unk_token = "", .ignore_merges = true}, "aba"), Ids({6}));
}

}  // namespace
}  // namespace trireme
