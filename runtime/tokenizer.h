// Text to token ids and back. Reads tokenizer.json (BPE: byte-level as in GPT-2, Llama 3 and Qwen,
// or SentencePiece-style with byte fallback as in Llama 2 and Mistral) or tokenizer.model
// (SentencePiece). Immutable after Load: thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

using TokenId = int32_t;

class TokenizerModel;  // one of the two formats, in tokenizer_bpe.cc and tokenizer_sentencepiece.cc

class Tokenizer {
 public:
  // Prefers DIR/tokenizer.json, falls back to DIR/tokenizer.model. NotFound when there is neither.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir);
  // From the text of a tokenizer.json / the bytes of a tokenizer.model; `name` is what error lines
  // call it.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(const std::string& json,
                                                             const std::string& name);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromSentencePiece(const std::string& bytes,
                                                                      const std::string& name);
  ~Tokenizer();

  // Ids of `text`, special tokens written in it recognised; with add_special_tokens also the
  // template's (BOS). InvalidArgument with the byte offset when text is not valid UTF-8.
  absl::StatusOr<std::vector<TokenId>> Encode(const std::string& text,
                                              bool add_special_tokens = true) const;
  // Text of `ids`; special tokens are left out when skip_special_tokens. Bytes that are not valid
  // UTF-8 become U+FFFD.
  std::string Decode(const std::vector<TokenId>& ids, bool skip_special_tokens = true) const;
  // The raw bytes that one id contributes in the middle of a text (a leading space kept). Empty for
  // unknown ids.
  const std::string& TokenBytes(TokenId id) const;
  bool IsSpecial(TokenId id) const;
  TokenId bos_id() const;  // -1 = none
  int64_t vocab_size() const;
  // Whether a decoder strips one leading space from the beginning of a text (SentencePiece's dummy
  // prefix).
  bool strips_leading_space() const;

 private:
  Tokenizer() = default;
  friend class TokenizerModel;
  std::unique_ptr<TokenizerModel> model_;
};

// Turns a stream of ids into a stream of text: gives out only whole UTF-8 characters, holds
// incomplete bytes back. The pieces of Append and Finish, joined, equal Tokenizer::Decode of all
// ids. The first text strips the dummy-prefix space only when `at_text_start`. Not thread-safe.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool at_text_start = true,
                       bool skip_special_tokens = true);
  std::string Append(TokenId id);
  std::string Finish();  // what is still held back, as U+FFFD

 private:
  const Tokenizer& tokenizer_;
  bool strip_next_space_;
  bool skip_special_tokens_;
  std::string pending_;
};

}  // namespace trireme
