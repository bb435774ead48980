#include <string_view>

#include "runtime/tokenizer.h"
#include "runtime/utf8.h"

namespace trireme {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool at_text_start, bool skip_special_tokens)
    : tokenizer_(tokenizer),
      strip_next_space_(at_text_start && tokenizer.strips_leading_space()),
      skip_special_tokens_(skip_special_tokens) {}

std::string Detokenizer::Append(TokenId id) {
  if (skip_special_tokens_ && tokenizer_.IsSpecial(id)) return "";
  std::string_view bytes = tokenizer_.TokenBytes(id);
  if (bytes.empty()) return "";
  if (strip_next_space_ && bytes.front() == ' ') bytes.remove_prefix(1);
  strip_next_space_ = false;
  pending_ += bytes;
  const size_t whole = pending_.size() - IncompleteUtf8Suffix(pending_);
  std::string text = ReplaceInvalidUtf8(std::string_view(pending_).substr(0, whole));
  pending_.erase(0, whole);
  return text;
}

std::string Detokenizer::Finish() {
  std::string text = ReplaceInvalidUtf8(pending_);
  pending_.clear();
  return text;
}

}  // namespace trireme
