#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "runtime/sentencepiece_library.h"
#include "runtime/tokenizer_model.h"
#include "runtime/utf8.h"

namespace trireme {
namespace {

constexpr char kSpaceSymbol[] = "\u2581";

class SentencePieceTokenizer : public TokenizerModel {
 public:
  SentencePieceTokenizer(TokenTable tokens, std::unique_ptr<SentencePieceLibrary> library)
      : TokenizerModel(std::move(tokens)), library_(std::move(library)) {}

  absl::Status Encode(const std::string& text, std::vector<TokenId>& ids) const override {
    std::vector<int> found;
    std::string error;
    if (!library_->Encode(text, found, error)) {
      return absl::InternalError(absl::StrCat("SentencePiece cannot encode the text: ", error));
    }
    ids.insert(ids.end(), found.begin(), found.end());
    return absl::OkStatus();
  }

 private:
  const std::unique_ptr<SentencePieceLibrary> library_;
};

// Byte pieces are spelled <0xNN>; empty when `piece` is not.
std::string ByteOf(const std::string& piece) {
  uint32_t byte = 0;
  if (piece.size() != 6 || !absl::SimpleHexAtoi(piece.substr(1, 4), &byte)) return "";
  return std::string(1, static_cast<char>(byte));
}

TokenTable MakeTable(const SentencePieceLibrary& library) {
  using Kind = SentencePieceLibrary::PieceKind;
  TokenTable tokens;
  bool found_space = false;
  for (int id = 0; id < library.size(); ++id) {
    const std::string piece = library.Piece(id);
    const Kind kind = library.Kind(id);
    tokens.special.push_back(kind == Kind::kControl || kind == Kind::kUnknown);
    if (kind == Kind::kByte) {
      tokens.bytes.push_back(ByteOf(piece));
    } else if (kind == Kind::kNormal) {
      tokens.bytes.push_back(absl::StrReplaceAll(piece, {{kSpaceSymbol, " "}}));
    } else {
      tokens.bytes.push_back(piece);
    }
    // The library does not show whether the model has a dummy prefix; that it strips one does.
    if (!found_space && kind == Kind::kNormal && tokens.bytes[id].front() == ' ') {
      found_space = true;
      tokens.strips_leading_space = library.Decode(id) == tokens.bytes[id].substr(1);
    }
  }
  return tokens;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseSentencePiece(
    const std::string& bytes, const std::string& name, const SentencePieceTemplate& surround) {
  std::unique_ptr<SentencePieceLibrary> library = SentencePieceLibrary::Parse(bytes);
  if (library == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": is no SentencePiece model, or is cut short"));
  }
  for (int id = 0; id < library->size(); ++id) {
    const std::string piece = library->Piece(id);
    if (piece.empty() || FindInvalidUtf8(piece) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": piece ", id, " must be valid UTF-8 and not empty"));
    }
  }
  TokenTable tokens = MakeTable(*library);
  if (surround.add_bos && library->bos_id() >= 0) tokens.prefix.push_back(library->bos_id());
  if (surround.add_eos && library->eos_id() >= 0) tokens.suffix.push_back(library->eos_id());
  return std::unique_ptr<TokenizerModel>(
      std::make_unique<SentencePieceTokenizer>(std::move(tokens), std::move(library)));
}

}  // namespace trireme
