// What tokenizer.json and tokenizer.model have in common, behind Tokenizer. Internal to
// runtime/tokenizer*.cc.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/tokenizer.h"

namespace trireme {

// What each id stands for, and what surrounds a text. Both vectors are [vocab_size]; ids that no
// entry has are empty.
struct TokenTable {
  std::vector<std::string> bytes;
  std::vector<char> special;
  std::vector<TokenId> prefix;  // put in front of a text with add_special_tokens (BOS)
  std::vector<TokenId> suffix;
  bool strips_leading_space = false;
};

// One implementation per format: BpeTokenizer and the SentencePiece one. Immutable: thread-safe.
class TokenizerModel {
 public:
  virtual ~TokenizerModel() = default;
  // Appends the ids of `text`, without the template's. REQUIRES: `text` is valid UTF-8.
  virtual absl::Status Encode(const std::string& text, std::vector<TokenId>& ids) const = 0;
  const TokenTable& tokens() const { return tokens_; }

  // The public face of `model`; the factories below end with it.
  static std::unique_ptr<Tokenizer> Wrap(std::unique_ptr<TokenizerModel> model);

 protected:
  explicit TokenizerModel(TokenTable tokens) : tokens_(std::move(tokens)) {}

 private:
  const TokenTable tokens_;
};

// In tokenizer_json.cc. `name` is what error lines call the file.
absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseTokenizerJson(const std::string& json,
                                                                   const std::string& name);

// What tokenizer_config.json says about a tokenizer.model, which cannot say it itself.
struct SentencePieceTemplate {
  bool add_bos = true;
  bool add_eos = false;
};

// In tokenizer_sentencepiece.cc.
absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseSentencePiece(
    const std::string& bytes, const std::string& name, const SentencePieceTemplate& surround);

}  // namespace trireme
