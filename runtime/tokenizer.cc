#include "runtime/tokenizer.h"

#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/json_file.h"
#include "nlohmann/json.hpp"
#include "runtime/tokenizer_model.h"
#include "runtime/utf8.h"

namespace trireme {
namespace {

// Symbols are linked by 32-bit positions, and a normaliser may make a text several times as long.
constexpr size_t kMaxTextBytes = size_t{1} << 28;
// The largest published are about 40 MB.
constexpr int64_t kMaxFileBytes = int64_t{1} << 30;

absl::StatusOr<SentencePieceTemplate> ReadTemplate(const std::string& path) {
  SentencePieceTemplate surround;
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return surround;
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxFileBytes));
  const auto config = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": must be a JSON object"));
  }
  for (auto [key, flag] :
       {std::pair{"add_bos_token", &surround.add_bos}, {"add_eos_token", &surround.add_eos}}) {
    const auto entry = config.find(key);
    if (entry == config.end() || entry->is_null()) continue;
    if (!entry->is_boolean()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", key, " must be true or false"));
    }
    *flag = entry->get<bool>();
  }
  return surround;
}

}  // namespace

std::unique_ptr<Tokenizer> TokenizerModel::Wrap(std::unique_ptr<TokenizerModel> model) {
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  tokenizer->model_ = std::move(model);
  return tokenizer;
}

Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  const std::string json_path = absl::StrCat(model_dir, "/tokenizer.json");
  const std::string model_path = absl::StrCat(model_dir, "/tokenizer.model");
  std::error_code ignored;
  if (std::filesystem::exists(json_path, ignored)) {
    ASSIGN_OR_RETURN(const std::string json, ReadTextFile(json_path, kMaxFileBytes));
    return FromJson(json, json_path);
  }
  if (!std::filesystem::exists(model_path, ignored)) {
    return absl::NotFoundError(
        absl::StrCat(model_dir, ": holds neither tokenizer.json nor tokenizer.model"));
  }
  ASSIGN_OR_RETURN(const std::string bytes, ReadTextFile(model_path, kMaxFileBytes));
  ASSIGN_OR_RETURN(const SentencePieceTemplate surround,
                   ReadTemplate(absl::StrCat(model_dir, "/tokenizer_config.json")));
  ASSIGN_OR_RETURN(auto model, ParseSentencePiece(bytes, model_path, surround));
  return TokenizerModel::Wrap(std::move(model));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(const std::string& json,
                                                               const std::string& name) {
  ASSIGN_OR_RETURN(auto model, ParseTokenizerJson(json, name));
  return TokenizerModel::Wrap(std::move(model));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromSentencePiece(const std::string& bytes,
                                                                        const std::string& name) {
  ASSIGN_OR_RETURN(auto model, ParseSentencePiece(bytes, name, SentencePieceTemplate()));
  return TokenizerModel::Wrap(std::move(model));
}

absl::StatusOr<std::vector<TokenId>> Tokenizer::Encode(const std::string& text,
                                                       bool add_special_tokens) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("text of ", text.size(), " bytes is too long: at most ", kMaxTextBytes));
  }
  const size_t invalid = FindInvalidUtf8(text);
  if (invalid != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("text is not valid UTF-8 at byte offset ", invalid));
  }
  const TokenTable& tokens = model_->tokens();
  std::vector<TokenId> ids;
  if (add_special_tokens) ids = tokens.prefix;
  RETURN_IF_ERROR(model_->Encode(text, ids));
  if (add_special_tokens) ids.insert(ids.end(), tokens.suffix.begin(), tokens.suffix.end());
  return ids;
}

std::string Tokenizer::Decode(const std::vector<TokenId>& ids, bool skip_special_tokens) const {
  std::string bytes;
  for (TokenId id : ids) {
    if (!skip_special_tokens || !IsSpecial(id)) bytes += TokenBytes(id);
  }
  const bool strip = strips_leading_space() && !bytes.empty() && bytes[0] == ' ';
  return ReplaceInvalidUtf8(std::string_view(bytes).substr(strip ? 1 : 0));
}

const std::string& Tokenizer::TokenBytes(TokenId id) const {
  static const std::string& kNone = *new std::string();
  return id >= 0 && id < vocab_size() ? model_->tokens().bytes[id] : kNone;
}

bool Tokenizer::IsSpecial(TokenId id) const {
  return id >= 0 && id < vocab_size() && model_->tokens().special[id];
}

TokenId Tokenizer::bos_id() const {
  const std::vector<TokenId>& prefix = model_->tokens().prefix;
  return prefix.empty() ? -1 : prefix.front();
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(model_->tokens().bytes.size());
}

bool Tokenizer::strips_leading_space() const { return model_->tokens().strips_leading_space; }

}  // namespace trireme
