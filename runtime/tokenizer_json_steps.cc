#include "runtime/tokenizer_json_steps.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

absl::Status UnsupportedType(const JsonNode& node, const std::string& type,
                             const std::string& supported) {
  return node.Unsupported(absl::StrCat("has type \"", type, "\"; supported are ", supported));
}

// {"String": "..."} or {"Regex": "..."}.
absl::StatusOr<Pattern> ReadPattern(const JsonNode& node) {
  if (!node.IsObject()) return node.Invalid("must be an object with String or Regex");
  if (!node.Child("String").IsNull()) {
    ASSIGN_OR_RETURN(std::string text, node.String("String"));
    return Pattern::Literal(std::move(text));
  }
  ASSIGN_OR_RETURN(const std::string source, node.String("Regex"));
  absl::StatusOr<Pattern> pattern = Pattern::Regex(source);
  if (!pattern.ok()) return node.Child("Regex").Invalid(std::string(pattern.status().message()));
  return pattern;
}

absl::StatusOr<ReplaceStep> ReadReplace(const JsonNode& node) {
  ASSIGN_OR_RETURN(Pattern pattern, ReadPattern(node.Child("pattern")));
  ASSIGN_OR_RETURN(std::string content, node.String("content"));
  return ReplaceStep{std::move(pattern), std::move(content)};
}

absl::StatusOr<SplitStep> ReadSplit(const JsonNode& node) {
  static constexpr std::pair<const char*, SplitBehavior> kBehaviors[] = {
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous}};
  ASSIGN_OR_RETURN(Pattern pattern, ReadPattern(node.Child("pattern")));
  ASSIGN_OR_RETURN(const bool invert, node.Bool("invert", false));
  ASSIGN_OR_RETURN(const std::string name, node.String("behavior"));
  for (const auto& [known, behavior] : kBehaviors) {
    if (name == known) return SplitStep{std::move(pattern), behavior, invert};
  }
  return node.Child("behavior")
      .Unsupported(
          absl::StrCat("is \"", name,
                       "\"; supported are Removed, Isolated, MergedWithPrevious, MergedWithNext, ",
                       "Contiguous"));
}

absl::Status AddDigits(const JsonNode& node, std::vector<PreTokenizerStep>& steps) {
  ASSIGN_OR_RETURN(const bool individual, node.Bool("individual_digits", false));
  ASSIGN_OR_RETURN(Pattern digits, Pattern::Regex("\\p{N}"));
  steps.emplace_back(
      std::in_place_type<SplitStep>,
      SplitStep{std::move(digits),
                individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false});
  return absl::OkStatus();
}

absl::Status AddByteLevel(const JsonNode& node, std::vector<PreTokenizerStep>& steps) {
  ASSIGN_OR_RETURN(const bool add_prefix_space, node.Bool("add_prefix_space", true));
  ASSIGN_OR_RETURN(const bool use_regex, node.Bool("use_regex", true));
  if (add_prefix_space) steps.emplace_back(std::in_place_type<PrefixSpaceStep>);
  if (use_regex) {
    ASSIGN_OR_RETURN(Pattern pattern, Pattern::Regex(kGpt2Pattern));
    steps.emplace_back(std::in_place_type<SplitStep>,
                       SplitStep{std::move(pattern), SplitBehavior::kIsolated, false});
  }
  steps.emplace_back(std::in_place_type<ByteLevelStep>);
  return absl::OkStatus();
}

struct Metaspace {
  MetaspaceStep step;
  bool split = true;
};

absl::StatusOr<Metaspace> ReadMetaspace(const JsonNode& node) {
  Metaspace out;
  ASSIGN_OR_RETURN(out.step.replacement, node.String("replacement"));
  if (out.step.replacement.empty())
    return node.Child("replacement").Invalid("must be one character");
  ASSIGN_OR_RETURN(out.split, node.Bool("split", true));
  // Old files say add_prefix_space instead of prepend_scheme.
  ASSIGN_OR_RETURN(const bool add_prefix_space, node.Bool("add_prefix_space", true));
  ASSIGN_OR_RETURN(const std::string scheme,
                   node.String("prepend_scheme", add_prefix_space ? "always" : "never"));
  if (scheme == "first") {
    out.step.prepend = MetaspaceStep::Prepend::kFirst;
  } else if (scheme == "never") {
    out.step.prepend = MetaspaceStep::Prepend::kNever;
  } else if (scheme != "always") {
    return node.Child("prepend_scheme").Invalid("must be always, first or never");
  }
  return out;
}

absl::Status AddMetaspace(const JsonNode& node, std::vector<PreTokenizerStep>& steps) {
  ASSIGN_OR_RETURN(Metaspace metaspace, ReadMetaspace(node));
  Pattern replacement = Pattern::Literal(metaspace.step.replacement);
  steps.emplace_back(std::in_place_type<MetaspaceStep>, std::move(metaspace.step));
  if (metaspace.split)
    steps.emplace_back(std::in_place_type<SplitStep>,
                       SplitStep{std::move(replacement), SplitBehavior::kMergedWithNext, false});
  return absl::OkStatus();
}

absl::Status AddStrip(const JsonNode& node, bool fused, PieceDecoder& decoder) {
  ASSIGN_OR_RETURN(const std::string content, node.String("content"));
  ASSIGN_OR_RETURN(const int64_t start, node.Index("start", int64_t{1} << 31));
  ASSIGN_OR_RETURN(const int64_t stop, node.Index("stop", int64_t{1} << 31));
  if (start == 0 && stop == 0) return absl::OkStatus();
  if (content != " " || start != 1 || stop != 0 || !fused) {
    return node.Unsupported(
        "must strip one space from the start (content \" \", start 1, stop 0) after Fuse");
  }
  decoder.strips_leading_space = true;
  return absl::OkStatus();
}

absl::Status AddDecoder(const JsonNode& node, bool& fused, PieceDecoder& decoder) {
  using Kind = PieceDecoder::Kind;
  if (!node.IsObject()) return node.Invalid("must be an object or null");
  ASSIGN_OR_RETURN(const std::string type, node.String("type"));
  if (type == "ByteLevel") {
    decoder.steps.push_back({Kind::kByteLevel, {}});
  } else if (type == "ByteFallback") {
    decoder.steps.push_back({Kind::kByteFallback, {}});
  } else if (type == "Fuse") {
    fused = true;
  } else if (type == "Strip") {
    return AddStrip(node, fused, decoder);
  } else if (type == "Replace") {
    ASSIGN_OR_RETURN(ReplaceStep replace, ReadReplace(node));
    decoder.steps.push_back({Kind::kReplace, {std::move(replace)}});
  } else if (type == "Metaspace") {
    ASSIGN_OR_RETURN(const Metaspace metaspace, ReadMetaspace(node));
    decoder.steps.push_back(
        {Kind::kReplace, {{Pattern::Literal(metaspace.step.replacement), " "}}});
    if (metaspace.step.prepend != MetaspaceStep::Prepend::kNever)
      decoder.strips_leading_space = true;
  } else {
    return UnsupportedType(node, type,
                           "ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace and Sequence");
  }
  return absl::OkStatus();
}

// The byte that a piece <0xNN> names, -1 for any other piece.
int NamedByte(const std::string& piece) {
  uint32_t byte = 0;
  if (piece.size() != 6 || piece.compare(0, 3, "<0x") != 0 || piece[5] != '>') return -1;
  return absl::SimpleHexAtoi(piece.substr(3, 2), &byte) ? static_cast<int>(byte) : -1;
}

}  // namespace

absl::Status PieceDecoder::Apply(std::string& piece) const {
  for (const Step& step : steps) {
    switch (step.kind) {
      case Kind::kReplace:
        RETURN_IF_ERROR(ApplyReplace(step.replace.front(), piece));
        break;
      case Kind::kByteLevel:
        piece = ByteLevelToBytes(piece);
        break;
      case Kind::kByteFallback:
        // The byte is no text any more: what follows would read it as UTF-8.
        if (const int byte = NamedByte(piece); byte >= 0) {
          piece.assign(1, static_cast<char>(byte));
          return absl::OkStatus();
        }
        break;
    }
  }
  return absl::OkStatus();
}

absl::Status ReadNormalizer(const JsonNode& node, std::vector<NormalizerStep>& steps) {
  if (node.IsNull()) return absl::OkStatus();
  if (!node.IsObject()) return node.Invalid("must be an object or null");
  ASSIGN_OR_RETURN(const std::string type, node.String("type"));
  if (type == "Sequence") {
    ASSIGN_OR_RETURN(const std::vector<JsonNode> parts, node.Objects("normalizers"));
    for (const JsonNode& part : parts) RETURN_IF_ERROR(ReadNormalizer(part, steps));
  } else if (type == "Prepend") {
    ASSIGN_OR_RETURN(std::string prefix, node.String("prepend"));
    steps.emplace_back(std::in_place_type<PrependStep>, PrependStep{std::move(prefix)});
  } else if (type == "Replace") {
    ASSIGN_OR_RETURN(ReplaceStep replace, ReadReplace(node));
    steps.emplace_back(std::in_place_type<ReplaceStep>, std::move(replace));
  } else if (type == "NFC") {
    steps.emplace_back(std::in_place_type<NfcStep>);
  } else {
    return UnsupportedType(node, type, "Prepend, Replace, NFC and Sequence");
  }
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const JsonNode& node, std::vector<PreTokenizerStep>& steps) {
  if (node.IsNull()) return absl::OkStatus();
  if (!node.IsObject()) return node.Invalid("must be an object or null");
  ASSIGN_OR_RETURN(const std::string type, node.String("type"));
  if (type == "Sequence") {
    ASSIGN_OR_RETURN(const std::vector<JsonNode> parts, node.Objects("pretokenizers"));
    for (const JsonNode& part : parts) RETURN_IF_ERROR(ReadPreTokenizer(part, steps));
    return absl::OkStatus();
  }
  if (type == "ByteLevel") return AddByteLevel(node, steps);
  if (type == "Metaspace") return AddMetaspace(node, steps);
  if (type == "Digits") return AddDigits(node, steps);
  if (type == "Split") {
    ASSIGN_OR_RETURN(SplitStep split, ReadSplit(node));
    steps.emplace_back(std::in_place_type<SplitStep>, std::move(split));
    return absl::OkStatus();
  }
  return UnsupportedType(node, type, "ByteLevel, Split, Metaspace, Digits and Sequence");
}

absl::Status ReadDecoder(const JsonNode& node, PieceDecoder& decoder) {
  if (node.IsNull()) return absl::OkStatus();
  bool fused = false;
  if (!node.IsObject()) return node.Invalid("must be an object or null");
  ASSIGN_OR_RETURN(const std::string type, node.String("type"));
  if (type != "Sequence") return AddDecoder(node, fused, decoder);
  ASSIGN_OR_RETURN(const std::vector<JsonNode> parts, node.Objects("decoders"));
  for (const JsonNode& part : parts) RETURN_IF_ERROR(AddDecoder(part, fused, decoder));
  return absl::OkStatus();
}

}  // namespace trireme
