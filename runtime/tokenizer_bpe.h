// Byte pair encoding: the vocabulary with its merges (Bpe), and the whole tokenizer of a
// tokenizer.json around it (BpeTokenizer). Internal to the tokenizer. Immutable and thread-safe
// after construction.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/added_tokens.h"
#include "runtime/normalizer.h"
#include "runtime/pretokenizer.h"
#include "runtime/tokenizer_model.h"

namespace trireme {

struct BpeOptions {
  std::string unk_token;  // empty: unknown characters are dropped
  bool byte_fallback =
      false;              // unknown characters become <0xNN> pieces where the vocabulary has them
  bool fuse_unk = false;  // neighbouring unknown characters become one unknown token
  bool ignore_merges = false;  // a word that is a piece becomes it, however the merges would go
};

class Bpe {
 public:
  using Vocab = std::vector<std::pair<std::string, TokenId>>;
  using Merges = std::vector<std::pair<std::string, std::string>>;
  // InvalidArgument when ids are out of range or given twice, or a merge names what is no piece;
  // the message names the entry, the caller puts the file in front.
  static absl::StatusOr<Bpe> Build(Vocab vocab, const Merges& merges, const BpeOptions& options);

  // Appends the ids of one word. O(n log n) in its length.
  void EncodeWord(std::string_view word, std::vector<TokenId>& ids) const;

  // Pieces by id; ids without a piece are empty.
  const std::vector<std::string>& pieces() const { return pieces_; }
  TokenId Find(std::string_view piece) const;  // -1: no piece

 private:
  struct Merge {
    int32_t rank;
    TokenId id;
  };
  struct Symbol {
    TokenId id;
    int32_t previous;
    int32_t next;
  };
  struct Candidate {
    int32_t rank;
    int32_t at;  // index of the left symbol
    TokenId id;  // of the merged piece
  };

  Bpe() = default;
  absl::Status AddVocab(Vocab vocab);
  absl::Status AddMerges(const Merges& merges);
  absl::Status ApplyOptions(const BpeOptions& options);
  const Merge* FindMerge(TokenId left, TokenId right) const;
  void SplitIntoCharacters(std::string_view word, std::vector<Symbol>& symbols) const;
  bool AppendBytes(std::string_view character, std::vector<Symbol>& symbols) const;
  void MergeAll(std::vector<Symbol>& symbols) const;

  std::vector<std::string> pieces_;
  absl::flat_hash_map<std::string_view, TokenId> ids_;  // keys point into pieces_
  absl::flat_hash_map<uint64_t, Merge> merges_;         // key: left id << 32 | right id
  std::array<TokenId, 256> byte_pieces_;                // -1: none
  TokenId unk_ = -1;
  BpeOptions options_;
};

class BpeTokenizer : public TokenizerModel {
 public:
  struct Parts {
    Bpe bpe;
    std::vector<AddedToken> raw_added;  // looked for in the text as it comes
    std::vector<AddedToken>
        normalized_added;  // looked for after normalisation; contents normalised too
    std::vector<NormalizerStep> normalizer;
    std::vector<PreTokenizerStep> pre_tokenizer;
  };
  BpeTokenizer(TokenTable tokens, Parts parts);
  absl::Status Encode(const std::string& text, std::vector<TokenId>& ids) const override;

 private:
  absl::Status EncodeBetweenTokens(std::string text, bool at_text_start,
                                   std::vector<TokenId>& ids) const;
  absl::Status EncodePlain(std::string text, bool at_text_start, std::vector<TokenId>& ids) const;

  const Bpe bpe_;
  const AddedTokenMatcher raw_added_;
  const AddedTokenMatcher normalized_added_;
  const std::vector<NormalizerStep> normalizer_;
  const std::vector<PreTokenizerStep> pre_tokenizer_;
};

}  // namespace trireme
