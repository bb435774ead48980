// Prompts from flags and files to requests. Rank 0's work.
#pragma once

#include <string>
#include <vector>

#include "launch/commands.h"
#include "models/config.h"

namespace trireme {

struct PromptRequest {
  Request request;    // id = index
  std::string text;   // as the user gave it; empty for token ids
  bool done = false;  // answered by an earlier attempt of a supervised job
};

// Requests of --prompt, --prompts FILE and --prompt-ids, in this order. FILE: one prompt a line,
// or, when its name ends in .jsonl, one object a line with "prompt" or "prompt_ids" and any of the
// sampling flags by name. An error names the flag, or the file and line.
absl::StatusOr<std::vector<PromptRequest>> CollectRequests(const GenerateFlags& flags,
                                                           const ModelConfig& config,
                                                           const Tokenizer* tokenizer);

// "1,5,9", "[1, 5, 9]" or ids between spaces and line breaks. Whatever else is in the text, a NUL
// or a sign too, is InvalidArgument with its line and byte, counted from 1; `what` is the flag or
// file.
absl::StatusOr<std::vector<TokenId>> ParseTokenIds(const std::string& what,
                                                   const std::string& text);

std::string SerializeRequests(const std::vector<PromptRequest>& requests);
std::vector<PromptRequest> ParseRequests(const std::string& bytes);

}  // namespace trireme
