// Reference counts, what is kept and in which order it goes, and the prefix cache on top.

#include "runtime/page_allocator.h"

#include <gtest/gtest.h>

#include "runtime/prefix_cache.h"

namespace trireme {
namespace {

TEST(PageAllocatorTest, APageIsBackWhenNobodyReadsIt) {
  PageAllocator pages(3);
  EXPECT_EQ(pages.Allocate(), 0);
  EXPECT_EQ(pages.Allocate(), 1);
  pages.Retain(0);
  pages.Release(0);
  EXPECT_EQ(pages.free_pages(), 1);
  pages.Release(0);
  EXPECT_EQ(pages.free_pages(), 2);
  EXPECT_EQ(pages.Allocate(), 0);
}

TEST(PageAllocatorTest, KeptPagesGoLastAndInTheOrderTheyWereLetGoOf) {
  PageAllocator pages(4);
  for (int i = 0; i < 4; ++i) pages.Allocate();
  for (const int page : {1, 2, 3}) pages.Keep(page);
  pages.Release(2);
  pages.Release(1);
  pages.Release(3);
  pages.Release(0);
  EXPECT_EQ(pages.free_pages(), 4);
  EXPECT_EQ(pages.kept_pages(), 3);
  pages.Retain(2);  // used again: no longer the oldest
  pages.Release(2);
  EXPECT_EQ(pages.NextVictim(), -1);
  EXPECT_EQ(pages.Allocate(), 0);
  EXPECT_EQ(pages.NextVictim(), 1);
  EXPECT_EQ(pages.Allocate(), 1);
  EXPECT_EQ(pages.Allocate(), 3);
  EXPECT_EQ(pages.Allocate(), 2);
  EXPECT_EQ(pages.free_pages(), 0);
}

TEST(PageAllocatorDeathTest, GivingBackTwiceIsOurFault) {
  PageAllocator pages(1);
  pages.Release(pages.Allocate());
  EXPECT_DEATH(pages.Release(0), "given back twice");
}

std::vector<TokenId> Tokens(int begin, int end) {
  std::vector<TokenId> out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

// Fills pages with `tokens`, caches the full ones and lets go of all, the last one first.
void Compute(PrefixCache& cache, const std::vector<TokenId>& tokens, size_t page_size) {
  std::vector<int32_t> pages;
  PrefixCache::Entry entry = PrefixCache::kStart;
  for (size_t i = 0; i + page_size <= tokens.size(); i += page_size) {
    pages.push_back(cache.Allocate());
    entry = cache.Insert(entry, std::span(tokens).subspan(i, page_size), pages.back());
    ASSERT_NE(entry, PrefixCache::kNotCached);
  }
  while (!pages.empty()) cache.Release(pages.back()), pages.pop_back();
}

TEST(PrefixCacheTest, FindsWholePagesOfAnEqualBeginning) {
  PrefixCache cache(8, 4);
  Compute(cache, Tokens(0, 12), 4);
  std::vector<int32_t> pages;
  cache.Match(Tokens(0, 11), &pages);
  EXPECT_EQ(pages, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(cache.free_pages(), 6);
  for (const int32_t page : pages) cache.Release(page);
  pages.clear();
  cache.Match(Tokens(4, 12), &pages);  // the same page contents without what came before
  EXPECT_TRUE(pages.empty());
}

TEST(PrefixCacheTest, LosesTheEndOfAChainFirst) {
  PrefixCache cache(3, 4);
  Compute(cache, Tokens(0, 12), 4);
  cache.Allocate();  // needs a page: that of tokens 8 to 11
  std::vector<int32_t> pages;
  cache.Match(Tokens(0, 12), &pages);
  EXPECT_EQ(pages.size(), 2u);
}

TEST(PrefixCacheTest, ForgottenPagesAreNotFoundAndNotKept) {
  PrefixCache cache(8, 4);
  Compute(cache, Tokens(0, 12), 4);
  std::vector<int32_t> pages;
  cache.Match(Tokens(0, 12), &pages);
  ASSERT_EQ(pages.size(), 3u);
  cache.Forget(pages[1]);
  cache.Forget(pages[1]);  // a second time changes nothing
  for (const int32_t page : pages) cache.Release(page);
  EXPECT_EQ(cache.pages().kept_pages(), 2);
  pages.clear();
  cache.Match(Tokens(0, 12), &pages);
  EXPECT_EQ(pages.size(), 1u) << "the chain ends before it";
  for (int i = 0; i < 7; ++i) cache.Allocate();  // the page behind it as well
  EXPECT_EQ(cache.free_pages(), 0);
}

TEST(PrefixCacheTest, EqualHashesOfDifferentTokensAreNotTakenForEqual) {
  PrefixCache cache(8, 2, /*hash_mask=*/0);  // every page has hash 0
  Compute(cache, {1, 2}, 2);
  std::vector<int32_t> pages;
  cache.Match(std::vector<TokenId>{3, 4}, &pages);
  EXPECT_TRUE(pages.empty());
  const int32_t page = cache.Allocate();
  EXPECT_EQ(cache.Insert(PrefixCache::kStart, std::vector<TokenId>{3, 4}, page),
            PrefixCache::kNotCached);
  cache.Match(std::vector<TokenId>{1, 2}, &pages);
  EXPECT_EQ(pages.size(), 1u);
}

TEST(PrefixCacheTest, TheSecondPageOfOneContentIsNotCachedButItsEntryIsKnown) {
  PrefixCache cache(8, 2);
  const int32_t first = cache.Allocate(), second = cache.Allocate();
  const std::vector<TokenId> tokens{1, 2};
  const auto entry = cache.Insert(PrefixCache::kStart, tokens, first);
  EXPECT_EQ(cache.Insert(PrefixCache::kStart, tokens, second), entry);
  cache.Release(second);
  EXPECT_EQ(cache.pages().kept_pages(), 0);
  cache.Release(first);
  EXPECT_EQ(cache.pages().kept_pages(), 1);
}

}  // namespace
}  // namespace trireme
