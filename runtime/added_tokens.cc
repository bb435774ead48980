#include "runtime/added_tokens.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/check.h"
#include "runtime/pattern.h"

namespace trireme {
namespace {

Pattern OwnPattern(const char* source) {
  absl::StatusOr<Pattern> pattern = Pattern::Regex(source);
  CHECK(pattern.ok()) << pattern.status().ToString();
  return *std::move(pattern);
}

// Whether `text` contains a match; the patterns below are anchored.
bool Matches(const Pattern& pattern, const std::string& text) {
  std::vector<ByteRange> matches;
  return pattern.FindAll(text, matches).ok() && !matches.empty();
}

// One neighbouring character: what the Unicode annex on regular expressions calls a word character.
// The four ranges are the circled letters, the only alphabetic characters outside L, Nl and M.
bool IsWordCharacter(const std::string& character) {
  static const Pattern& kWord = *new Pattern(OwnPattern(
      "[\\p{L}\\p{Nl}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}\\x{24B6}-\\x{24E9}\\x{1F130}-\\x{1F149}"
      "\\x{1F150}-\\x{1F169}\\x{1F170}-\\x{1F189}]"));
  return Matches(kWord, character);
}

bool IsSpaceCharacter(const std::string& character) {
  if (character.size() == 1)
    return character[0] == ' ' || (character[0] >= '\t' && character[0] <= '\r');
  static const Pattern& kSpace = *new Pattern(OwnPattern("[\\x{85}\\p{Z}]"));
  return Matches(kSpace, character);
}

// The character that ends, or begins, at `offset`; empty at the end of the text.
std::string CharacterBefore(std::string_view text, size_t offset) {
  size_t begin = offset;
  while (begin > 0) {
    --begin;
    if ((text[begin] & 0xC0) != 0x80) break;
  }
  return std::string(text.substr(begin, offset - begin));
}

std::string CharacterAt(std::string_view text, size_t offset) {
  size_t end = std::min(offset + 1, text.size());
  while (end < text.size() && (text[end] & 0xC0) == 0x80) ++end;
  return std::string(text.substr(offset, end - offset));
}

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  return !IsWordCharacter(CharacterBefore(text, begin)) && !IsWordCharacter(CharacterAt(text, end));
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (const AddedToken& token : tokens_) {
    CHECK(!token.content.empty()) << "added token " << token.id;
    by_content_.emplace(token.content, &token);
    lengths_[static_cast<unsigned char>(token.content[0])].push_back(token.content.size());
  }
  for (std::vector<size_t>& lengths : lengths_) {
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }
}

// The first token at or after `begin`, which moves to where the token begins; null when there is
// none.
const AddedToken* AddedTokenMatcher::Find(std::string_view text, size_t& begin) const {
  for (; begin < text.size(); ++begin) {
    for (size_t length : lengths_[static_cast<unsigned char>(text[begin])]) {
      if (length > text.size() - begin) continue;
      const auto found = by_content_.find(text.substr(begin, length));
      if (found != by_content_.end()) return found->second;
    }
  }
  return nullptr;
}

std::vector<Segment> AddedTokenMatcher::Cut(std::string_view text) const {
  std::vector<Segment> segments;
  size_t done = 0;
  size_t at = 0;
  while (const AddedToken* token = Find(text, at)) {
    size_t begin = at;
    size_t end = begin + token->content.size();
    at = end;
    if (token->single_word && !StandsAlone(text, begin, end)) continue;
    if (token->lstrip) {
      while (begin > done) {
        const std::string character = CharacterBefore(text, begin);
        if (!IsSpaceCharacter(character)) break;
        begin -= character.size();
      }
    }
    if (token->rstrip) {
      while (end < text.size()) {
        const std::string character = CharacterAt(text, end);
        if (!IsSpaceCharacter(character)) break;
        end += character.size();
      }
      at = end;
    }
    if (begin > done) segments.push_back({-1, done, begin});
    segments.push_back({token->id, begin, end});
    done = end;
  }
  if (done < text.size()) segments.push_back({-1, done, text.size()});
  return segments;
}

}  // namespace trireme
