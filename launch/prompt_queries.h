// Queries of `trireme retrieve` out of prompts: a language model, sharded over the same ranks,
// makes of each prompt the hidden state that a head of Mixture-of-Logits was trained on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launch/commands.h"
#include "runtime/retrieval_search.h"

namespace trireme {

struct EmbedderFlags {
  ModelFlags model;  // its model_dir: "" = none
  std::vector<std::string> prompts;
  std::string prompts_file;
};
void AddEmbedderFlags(CLI::App* app, EmbedderFlags* flags);

// The prompts' tokens. For rank 0. A usage error where there is no prompt.
absl::StatusOr<std::vector<std::vector<TokenId>>> ReadPrompts(const EmbedderFlags& flags);

// A query for each of rank 0's prompts: the hidden state of its last token, behind the final norm.
// Loads the model, which is gone afterwards. Collective; the queries are rank 0's.
absl::StatusOr<std::vector<RetrievalQuery>> EmbedPrompts(
    ControlPlane& control, const ModelFlags& model, int64_t query_dim,
    const std::vector<std::vector<TokenId>>& prompts);

}  // namespace trireme
