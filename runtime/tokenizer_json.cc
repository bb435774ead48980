#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "runtime/tokenizer_bpe.h"
#include "runtime/tokenizer_json_reader.h"
#include "runtime/tokenizer_json_steps.h"
#include "runtime/tokenizer_model.h"

namespace trireme {
namespace {

absl::StatusOr<Bpe> BuildBpe(TokenizerJson& file, const JsonNode& root) {
  const JsonNode model = root.Child("model");
  if (!model.IsObject()) return model.Invalid("must be an object");
  // Old files leave the type out.
  ASSIGN_OR_RETURN(const std::string type, model.String("type", file.has_merges ? "BPE" : ""));
  if (type != "BPE")
    return model.Unsupported(absl::StrCat("has type \"", type, "\"; only BPE is supported"));
  if (!file.has_vocab) return model.Child("vocab").Invalid("must be an object");
  if (!file.has_merges) return model.Child("merges").Invalid("must be an array");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    ASSIGN_OR_RETURN(const std::string affix, model.String(key, ""));
    if (!affix.empty()) return model.Child(key).Unsupported("is not supported; only null is");
  }
  const JsonNode dropout = model.Child("dropout");
  if (!dropout.IsNull() && dropout.value() != 0)
    return dropout.Unsupported("is not supported; only null is");
  BpeOptions options;
  ASSIGN_OR_RETURN(options.unk_token, model.String("unk_token", ""));
  ASSIGN_OR_RETURN(options.byte_fallback, model.Bool("byte_fallback", false));
  ASSIGN_OR_RETURN(options.fuse_unk, model.Bool("fuse_unk", false));
  ASSIGN_OR_RETURN(options.ignore_merges, model.Bool("ignore_merges", false));
  absl::StatusOr<Bpe> bpe = Bpe::Build(std::move(file.vocab), file.merges, options);
  if (!bpe.ok()) return root.Invalid(std::string(bpe.status().message()));
  return bpe;
}

struct AddedTokenEntry {
  AddedToken token;
  bool special = false;
  bool normalized = false;
};

absl::StatusOr<AddedTokenEntry> ReadAddedToken(const JsonNode& node, const Bpe& bpe,
                                               int64_t id_limit) {
  AddedTokenEntry entry;
  ASSIGN_OR_RETURN(const int64_t id, node.Index("id", id_limit));
  entry.token.id = static_cast<TokenId>(id);
  ASSIGN_OR_RETURN(entry.token.content, node.String("content"));
  ASSIGN_OR_RETURN(entry.token.single_word, node.Bool("single_word", false));
  ASSIGN_OR_RETURN(entry.token.lstrip, node.Bool("lstrip", false));
  ASSIGN_OR_RETURN(entry.token.rstrip, node.Bool("rstrip", false));
  ASSIGN_OR_RETURN(entry.special, node.Bool("special", false));
  ASSIGN_OR_RETURN(entry.normalized, node.Bool("normalized", !entry.special));
  const TokenId in_vocab = bpe.Find(entry.token.content);
  const auto& pieces = bpe.pieces();
  const bool id_taken = static_cast<size_t>(id) < pieces.size() && bpe.Find(pieces[id]) == id;
  if (in_vocab >= 0 ? in_vocab != id : id_taken) {
    return node.Invalid(absl::StrCat("has id ", id, ", but model.vocab gives ",
                                     in_vocab >= 0 ? absl::StrCat("this content id ", in_vocab)
                                                   : std::string("that id to another piece")));
  }
  return entry;
}

absl::StatusOr<std::vector<AddedTokenEntry>> ReadAddedTokens(const JsonNode& root, const Bpe& bpe,
                                                             int64_t id_limit) {
  std::vector<AddedTokenEntry> entries;
  absl::flat_hash_map<std::string, TokenId> by_content;
  absl::flat_hash_map<TokenId, size_t> by_id;
  ASSIGN_OR_RETURN(const std::vector<JsonNode> nodes, root.Objects("added_tokens"));
  for (const JsonNode& node : nodes) {
    ASSIGN_OR_RETURN(AddedTokenEntry entry, ReadAddedToken(node, bpe, id_limit));
    if (!by_id.emplace(entry.token.id, entries.size()).second ||
        !by_content.emplace(entry.token.content, entry.token.id).second) {
      return node.Invalid("repeats the id or the content of an earlier entry");
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

// The contents of normalised entries are normalised already: that is what they stand for, the space
// in front of a word included.
absl::StatusOr<TokenTable> MakeTable(const Bpe& bpe, const std::vector<AddedTokenEntry>& added,
                                     const PieceDecoder& decoder) {
  std::vector<std::string> pieces = bpe.pieces();
  TokenTable tokens;
  for (const AddedTokenEntry& entry : added) {
    pieces.resize(std::max<size_t>(pieces.size(), entry.token.id + 1));
    pieces[entry.token.id] = entry.token.content;
  }
  tokens.special.resize(pieces.size());
  for (const AddedTokenEntry& entry : added) tokens.special[entry.token.id] = entry.special;
  for (std::string& piece : pieces) RETURN_IF_ERROR(decoder.Apply(piece));
  tokens.bytes = std::move(pieces);
  tokens.strips_leading_space = decoder.strips_leading_space;
  return tokens;
}

// The ids that a SpecialToken entry of the template stands for.
absl::Status AddTemplateIds(const JsonNode& processor, const std::string& name,
                            const TokenTable& tokens, std::vector<TokenId>& out) {
  const JsonNode table = processor.Child("special_tokens");
  if (!table.IsObject()) return table.Invalid("must be an object");
  const JsonNode entry = table.Child(name);
  if (!entry.IsObject()) return entry.Invalid("must be an object, as the template uses it");
  const JsonNode ids = entry.Child("ids");
  if (!ids.value().is_array()) return ids.Invalid("must be an array");
  for (const nlohmann::json& id : ids.value()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= tokens.bytes.size()) {
      return ids.Invalid(absl::StrCat("must hold ids from 0 to ", tokens.bytes.size() - 1));
    }
    out.push_back(id.get<TokenId>());
  }
  return absl::OkStatus();
}

absl::Status ReadTemplate(const JsonNode& processor, TokenTable& tokens) {
  if (!tokens.prefix.empty() || !tokens.suffix.empty()) {
    return processor.Unsupported("is a second TemplateProcessing; only one is supported");
  }
  ASSIGN_OR_RETURN(const std::vector<JsonNode> items, processor.Objects("single"));
  bool after_text = false;
  for (const JsonNode& item : items) {
    if (const JsonNode special = item.Child("SpecialToken"); special.IsObject()) {
      ASSIGN_OR_RETURN(const std::string name, special.String("id"));
      RETURN_IF_ERROR(
          AddTemplateIds(processor, name, tokens, after_text ? tokens.suffix : tokens.prefix));
    } else if (item.Child("Sequence").IsObject() && !after_text) {
      after_text = true;
    } else {
      return item.Invalid("must be a SpecialToken or the only Sequence of the template");
    }
  }
  if (!after_text) return processor.Child("single").Invalid("must hold one Sequence");
  return absl::OkStatus();
}

absl::Status ReadPostProcessor(const JsonNode& processor, bool nested, TokenTable& tokens) {
  if (processor.IsNull()) return absl::OkStatus();
  if (!processor.IsObject()) return processor.Invalid("must be an object or null");
  ASSIGN_OR_RETURN(const std::string type, processor.String("type"));
  if (type == "ByteLevel")
    return absl::OkStatus();  // only moves offsets, which are not given out here
  if (type == "TemplateProcessing") return ReadTemplate(processor, tokens);
  if (type == "Sequence" && !nested) {
    ASSIGN_OR_RETURN(const std::vector<JsonNode> processors, processor.Objects("processors"));
    for (const JsonNode& one : processors) RETURN_IF_ERROR(ReadPostProcessor(one, true, tokens));
    return absl::OkStatus();
  }
  return processor.Unsupported(absl::StrCat("has type \"", type,
                                            "\"; supported are TemplateProcessing, ByteLevel ",
                                            "and one Sequence of them"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseTokenizerJson(const std::string& json,
                                                                   const std::string& name) {
  ASSIGN_OR_RETURN(TokenizerJson file, ReadTokenizerJson(json, name));
  const JsonNode root(file.rest, name, "");
  ASSIGN_OR_RETURN(Bpe bpe, BuildBpe(file, root));
  ASSIGN_OR_RETURN(std::vector<AddedTokenEntry> added,
                   ReadAddedTokens(root, bpe, TokenIdLimit(json.size())));
  BpeTokenizer::Parts parts{std::move(bpe), {}, {}, {}, {}};
  RETURN_IF_ERROR(ReadNormalizer(root.Child("normalizer"), parts.normalizer));
  for (AddedTokenEntry& entry : added) {
    if (!entry.normalized) continue;
    const absl::Status normalized = Normalize(parts.normalizer, entry.token.content);
    if (!normalized.ok())
      return root.Child("normalizer").Invalid(std::string(normalized.message()));
  }
  RETURN_IF_ERROR(ReadPreTokenizer(root.Child("pre_tokenizer"), parts.pre_tokenizer));
  PieceDecoder decoder;
  RETURN_IF_ERROR(ReadDecoder(root.Child("decoder"), decoder));
  absl::StatusOr<TokenTable> tokens = MakeTable(parts.bpe, added, decoder);
  if (!tokens.ok()) return root.Child("decoder").Invalid(std::string(tokens.status().message()));
  RETURN_IF_ERROR(ReadPostProcessor(root.Child("post_processor"), false, *tokens));
  for (AddedTokenEntry& entry : added) {
    if (entry.token.content.empty()) continue;
    (entry.normalized ? parts.normalized_added : parts.raw_added).push_back(std::move(entry.token));
  }
  return std::unique_ptr<TokenizerModel>(
      std::make_unique<BpeTokenizer>(*std::move(tokens), std::move(parts)));
}

}  // namespace trireme
