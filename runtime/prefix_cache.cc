#include "runtime/prefix_cache.h"

#include <algorithm>

#include "kernels/check.h"

namespace trireme {

PrefixCache::PrefixCache(int64_t pages, int64_t page_size, uint64_t hash_mask)
    : pages_(pages),
      page_size_(page_size),
      hash_mask_(hash_mask),
      cached_(pages),
      tokens_(pages * page_size) {
  // A table that what was erased has filled up clears itself in place where at most 25/32 of its
  // places are taken; where more are, it grows.
  by_hash_.reserve((pages + 1) * 9 / 8 + 1);
}

int32_t PrefixCache::Allocate() {
  if (const int32_t victim = pages_.NextVictim(); victim >= 0) {
    Cached& cached = cached_[victim];
    CHECK_NE(cached.entry, kStart);
    by_hash_.erase(cached.hash);
    cached = {};
  }
  const int32_t page = pages_.Allocate();
  // Victims lie all over the memory, and many sequences take a page in one step: what the next ones
  // will look at is fetched ahead.
  if (const int32_t next = pages_.NextVictim(); next >= 0) {
    by_hash_.prefetch(cached_[next].hash);
    if (const int32_t after = pages_.VictimAfter(next); after >= 0)
      __builtin_prefetch(&cached_[after], /*rw=*/1);
  }
  return page;
}

// Multiply and fold, as in wyhash (Wang Yi, 2019): two 64-bit words a step.
uint64_t PrefixCache::Hash(Entry before, std::span<const TokenId> tokens) const {
  const auto mix = [](uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  uint64_t hash = mix(before ^ 0xA0761D6478BD642Full, 0xE7037ED1A0B428DBull);
  for (const TokenId token : tokens)
    hash = mix(hash ^ static_cast<uint32_t>(token) ^ 0x8EBC6AF09C88C6E3ull, 0x589965CC75374CC3ull);
  return hash & hash_mask_;
}

bool PrefixCache::Holds(int32_t page, Entry before, std::span<const TokenId> tokens) const {
  return cached_[page].before == before &&
         std::equal(tokens.begin(), tokens.end(), tokens_.data() + page * page_size_);
}

PrefixCache::Entry PrefixCache::Match(std::span<const TokenId> tokens,
                                      std::vector<int32_t>* pages) {
  Entry last = kStart;
  for (size_t begin = 0; begin + page_size_ <= tokens.size(); begin += page_size_) {
    const auto content = tokens.subspan(begin, page_size_);
    const auto found = by_hash_.find(Hash(last, content));
    if (found == by_hash_.end() || !Holds(found->second, last, content)) break;
    pages_.Retain(found->second);
    pages->push_back(found->second);
    last = cached_[found->second].entry;
  }
  return last;
}

PrefixCache::Entry PrefixCache::Insert(Entry before, std::span<const TokenId> tokens,
                                       int32_t page) {
  CHECK_EQ(static_cast<int64_t>(tokens.size()), page_size_);
  const uint64_t hash = Hash(before, tokens);
  const auto [holder, added] = by_hash_.try_emplace(hash, page);
  if (!added) {
    return Holds(holder->second, before, tokens) ? cached_[holder->second].entry : kNotCached;
  }
  if (cached_[page].entry != kStart) {  // it holds something else already
    by_hash_.erase(holder);
    return kNotCached;
  }
  cached_[page] = {.entry = next_entry_++, .before = before, .hash = hash};
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + page * page_size_);
  pages_.Keep(page);
  return cached_[page].entry;
}

// What follows it stays under an entry that no chain leads to, until its room is needed.
void PrefixCache::Forget(int32_t page) {
  Cached& cached = cached_[page];
  if (cached.entry == kStart) return;
  by_hash_.erase(cached.hash);
  cached = {};
  pages_.Forget(page);
}

}  // namespace trireme
