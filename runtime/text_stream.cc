#include "runtime/text_stream.h"

#include <algorithm>
#include <utility>

namespace trireme {

TextStream::TextStream(const Tokenizer* tokenizer, const std::vector<TokenId>& prompt,
                       std::vector<std::string> stop)
    : stop_(std::move(stop)) {
  if (tokenizer == nullptr) return;
  // After a prompt the text goes on in the middle: its leading space is real.
  const bool at_text_start = std::all_of(prompt.begin(), prompt.end(),
                                         [&](TokenId id) { return tokenizer->IsSpecial(id); });
  detokenizer_.emplace(*tokenizer, at_text_start);
}

std::string TextStream::Append(TokenId token) {
  return detokenizer_ ? Release(detokenizer_->Append(token)) : "";
}

std::string TextStream::Release(const std::string& piece) {
  if (stopped_) return "";
  held_ += piece;
  size_t cut = std::string::npos;
  for (const std::string& stop : stop_) cut = std::min(cut, held_.find(stop));
  if (cut != std::string::npos) {
    stopped_ = true;
    held_.resize(cut);
    return std::exchange(held_, "");
  }
  size_t keep = 0;  // longest end of the text that begins a stop string
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) keep = n;
    }
  }
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string TextStream::Finish() {
  std::string out = detokenizer_ ? Release(detokenizer_->Finish()) : "";
  return out + std::exchange(held_, "");
}

}  // namespace trireme
