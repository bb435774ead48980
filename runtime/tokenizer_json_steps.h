// The normalizer, pre_tokenizer and decoder of a tokenizer.json: each a list of steps, read from
// JSON. Kinds that are not supported are Unimplemented and named. Internal to the tokenizer.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "runtime/normalizer.h"
#include "runtime/pretokenizer.h"
#include "runtime/tokenizer_json_reader.h"

namespace trireme {

// What a decoder makes of one piece, so that texts are joined from bytes per id. Two decoders look
// at their neighbours and differ here: ByteFallback, whose byte pieces are joined before invalid
// UTF-8 is replaced, and Metaspace, which loses only one leading space.
struct PieceDecoder {
  enum class Kind { kReplace, kByteFallback, kByteLevel };
  struct Step {
    Kind kind;
    std::vector<ReplaceStep> replace;  // one for kReplace, else none
  };
  std::vector<Step> steps;
  bool strips_leading_space = false;

  absl::Status Apply(std::string& piece) const;
};

// Each accepts null: no steps.
absl::Status ReadNormalizer(const JsonNode& node, std::vector<NormalizerStep>& steps);
absl::Status ReadPreTokenizer(const JsonNode& node, std::vector<PreTokenizerStep>& steps);
absl::Status ReadDecoder(const JsonNode& node, PieceDecoder& decoder);

}  // namespace trireme
