// The text of one request as its tokens come: detokenised, cut at stop strings, given out as soon
// as it cannot turn into one any more. Not thread-safe.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/request.h"
#include "runtime/tokenizer.h"

namespace trireme {

class TextStream {
 public:
  // `tokenizer` may be null (a checkpoint without one): then the text stays empty.
  TextStream(const Tokenizer* tokenizer, const std::vector<TokenId>& prompt,
             std::vector<std::string> stop);

  // Text that is final now. Sets stopped() when a stop string has appeared; it and what follows are
  // dropped.
  std::string Append(TokenId token);
  // What was held back. Call once, at the end.
  std::string Finish();
  bool stopped() const { return stopped_; }

 private:
  std::string Release(const std::string& piece);

  std::optional<Detokenizer> detokenizer_;
  std::vector<std::string> stop_;
  std::string held_;  // may still become a stop string
  bool stopped_ = false;
};

}  // namespace trireme
