#include "runtime/tokenizer_bpe.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "runtime/utf8.h"

namespace trireme {
namespace {

std::string Quoted(const std::string& piece) {
  constexpr size_t kShown = 60;
  return absl::StrCat("\"", absl::CHexEscape(piece.substr(0, kShown)),
                      piece.size() > kShown ? "..." : "", "\"");
}

uint64_t PairKey(TokenId left, TokenId right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

absl::StatusOr<Bpe> Bpe::Build(Vocab vocab, const Merges& merges, const BpeOptions& options) {
  Bpe bpe;
  RETURN_IF_ERROR(bpe.AddVocab(std::move(vocab)));
  RETURN_IF_ERROR(bpe.AddMerges(merges));
  RETURN_IF_ERROR(bpe.ApplyOptions(options));
  return bpe;
}

absl::Status Bpe::AddVocab(Vocab vocab) {
  TokenId last = -1;
  for (const auto& [piece, id] : vocab) last = std::max(last, id);
  pieces_.resize(last + 1);
  std::vector<char> taken(pieces_.size());
  ids_.reserve(vocab.size());
  for (auto& [piece, id] : vocab) {
    CHECK_GE(id, 0);
    if (taken[id]) {
      return absl::InvalidArgumentError(absl::StrCat("model.vocab gives id ", id, " to both ",
                                                     Quoted(pieces_[id]), " and ", Quoted(piece),
                                                     "; each id must be given once"));
    }
    taken[id] = 1;
    pieces_[id] = std::move(piece);
    if (!ids_.emplace(pieces_[id], id).second) {
      return absl::InvalidArgumentError(absl::StrCat("model.vocab holds ", Quoted(pieces_[id]),
                                                     " twice; each piece must have one id"));
    }
  }
  return absl::OkStatus();
}

absl::Status Bpe::AddMerges(const Merges& merges) {
  merges_.reserve(merges.size());
  std::string joined;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    joined.assign(left).append(right);
    for (const std::string* piece : {&left, &right, static_cast<const std::string*>(&joined)}) {
      if (Find(*piece) >= 0) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("model.merges entry ", rank, " (", Quoted(left), ", ", Quoted(right),
                       ") needs the piece ", Quoted(*piece), ", which model.vocab must hold"));
    }
    // A pair given twice counts with its last rank, as in the library that writes these files.
    merges_[PairKey(Find(left), Find(right))] = {static_cast<int32_t>(rank), Find(joined)};
  }
  return absl::OkStatus();
}

absl::Status Bpe::ApplyOptions(const BpeOptions& options) {
  options_ = options;
  byte_pieces_.fill(-1);
  for (int byte = 0; byte < 256 && options.byte_fallback; ++byte) {
    byte_pieces_[byte] = Find(absl::StrFormat("<0x%02X>", byte));
  }
  if (options.unk_token.empty()) return absl::OkStatus();
  unk_ = Find(options.unk_token);
  if (unk_ >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("model.unk_token is ", Quoted(options.unk_token),
                                                 ", which model.vocab must hold"));
}

TokenId Bpe::Find(std::string_view piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

const Bpe::Merge* Bpe::FindMerge(TokenId left, TokenId right) const {
  const auto found = merges_.find(PairKey(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

bool Bpe::AppendBytes(std::string_view character, std::vector<Symbol>& symbols) const {
  if (!options_.byte_fallback) return false;
  for (unsigned char byte : character) {
    if (byte_pieces_[byte] < 0) return false;
  }
  for (unsigned char byte : character) symbols.push_back({byte_pieces_[byte], 0, 0});
  return true;
}

void Bpe::SplitIntoCharacters(std::string_view word, std::vector<Symbol>& symbols) const {
  symbols.clear();
  symbols.reserve(word.size());
  bool after_unk = false;
  for (size_t end = 0; end < word.size();) {
    const size_t begin = end;
    NextUtf8(word, end);
    const std::string_view character = word.substr(begin, end - begin);
    const TokenId id = Find(character);
    bool unk = false;
    if (id >= 0) {
      symbols.push_back({id, 0, 0});
    } else if (!AppendBytes(character, symbols) && unk_ >= 0) {
      unk = true;
      if (!after_unk || !options_.fuse_unk) symbols.push_back({unk_, 0, 0});
    }
    after_unk = unk;
  }
  const int32_t count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[i].previous = i - 1;
    symbols[i].next = i + 1 < count ? i + 1 : -1;
  }
}

// The best pair anywhere is merged next: a heap of candidate pairs over a doubly linked list. A
// merged-away symbol has id -1; a candidate whose symbols have changed meanwhile is dropped when it
// comes up.
void Bpe::MergeAll(std::vector<Symbol>& symbols) const {
  const auto worse = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  };
  std::vector<Candidate> heap;
  const auto candidate = [&](int32_t left) {
    const Merge* merge = FindMerge(symbols[left].id, symbols[symbols[left].next].id);
    if (merge == nullptr) return false;
    heap.push_back({merge->rank, left, merge->id});
    return true;
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) candidate(i);
  std::make_heap(heap.begin(), heap.end(), worse);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Candidate best = heap.back();
    heap.pop_back();
    Symbol& left = symbols[best.at];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Merge* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->id != best.id) continue;
    left.id = best.id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = best.at;
    if (left.previous >= 0 && candidate(left.previous))
      std::push_heap(heap.begin(), heap.end(), worse);
    if (left.next >= 0 && candidate(best.at)) std::push_heap(heap.begin(), heap.end(), worse);
  }
}

void Bpe::EncodeWord(std::string_view word, std::vector<TokenId>& ids) const {
  if (options_.ignore_merges) {
    if (const TokenId whole = Find(word); whole >= 0) {
      ids.push_back(whole);
      return;
    }
  }
  std::vector<Symbol> symbols;
  SplitIntoCharacters(word, symbols);
  MergeAll(symbols);
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

BpeTokenizer::BpeTokenizer(TokenTable tokens, Parts parts)
    : TokenizerModel(std::move(tokens)),
      bpe_(std::move(parts.bpe)),
      raw_added_(std::move(parts.raw_added)),
      normalized_added_(std::move(parts.normalized_added)),
      normalizer_(std::move(parts.normalizer)),
      pre_tokenizer_(std::move(parts.pre_tokenizer)) {}

absl::Status BpeTokenizer::Encode(const std::string& text, std::vector<TokenId>& ids) const {
  for (const Segment& segment : raw_added_.Cut(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
      continue;
    }
    RETURN_IF_ERROR(EncodeBetweenTokens(text.substr(segment.begin, segment.end - segment.begin),
                                        segment.begin == 0, ids));
  }
  return absl::OkStatus();
}

absl::Status BpeTokenizer::EncodeBetweenTokens(std::string text, bool at_text_start,
                                               std::vector<TokenId>& ids) const {
  RETURN_IF_ERROR(Normalize(normalizer_, text));
  if (normalized_added_.empty()) return EncodePlain(std::move(text), at_text_start, ids);
  for (const Segment& segment : normalized_added_.Cut(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
      continue;
    }
    RETURN_IF_ERROR(EncodePlain(text.substr(segment.begin, segment.end - segment.begin),
                                at_text_start && segment.begin == 0, ids));
  }
  return absl::OkStatus();
}

absl::Status BpeTokenizer::EncodePlain(std::string text, bool at_text_start,
                                       std::vector<TokenId>& ids) const {
  std::vector<std::string> words;
  RETURN_IF_ERROR(PreTokenize(pre_tokenizer_, std::move(text), at_text_start, words));
  // Words repeat: where in `ids` an equal word was put before. Local to the call, so that no lock
  // is needed.
  struct Place {
    size_t begin;
    size_t count;
  };
  constexpr size_t kLongestKept = 64;
  absl::flat_hash_map<std::string_view, Place> seen;
  for (const std::string& word : words) {
    const bool keep = words.size() > 1 && word.size() <= kLongestKept;
    if (keep) {
      if (const auto found = seen.find(word); found != seen.end()) {
        const Place place = found->second;
        for (size_t i = 0; i < place.count; ++i) ids.push_back(TokenId{ids[place.begin + i]});
        continue;
      }
    }
    const size_t begin = ids.size();
    bpe_.EncodeWord(word, ids);
    if (keep) seen.emplace(word, Place{begin, ids.size() - begin});
  }
  return absl::OkStatus();
}

}  // namespace trireme
