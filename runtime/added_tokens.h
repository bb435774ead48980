// Tokens that are cut out of a text as a whole before anything else sees it (special tokens,
// user-defined words). Internal to the tokenizer. Immutable and thread-safe after construction.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "runtime/tokenizer.h"

namespace trireme {

struct AddedToken {
  TokenId id = -1;
  std::string content;       // what is looked for; never empty
  bool single_word = false;  // only where no word character is beside it
  bool lstrip = false;       // takes the white space in front of it
  bool rstrip = false;       // takes the white space behind it
};

// A stretch of a text: one added token, or (id -1) what lies between two.
struct Segment {
  TokenId id;
  size_t begin;
  size_t end;
};

class AddedTokenMatcher {
 public:
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);
  // Cuts the whole of `text` (valid UTF-8), leftmost token first, the longest of those that begin
  // at one place.
  std::vector<Segment> Cut(std::string_view text) const;
  bool empty() const { return tokens_.empty(); }

 private:
  const AddedToken* Find(std::string_view text, size_t& begin) const;

  const std::vector<AddedToken> tokens_;
  absl::flat_hash_map<std::string_view, const AddedToken*> by_content_;
  std::vector<size_t>
      lengths_[256];  // by first byte: the lengths in bytes that occur, longest first
};

}  // namespace trireme
