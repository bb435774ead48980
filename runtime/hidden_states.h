// The language model as an encoder: what it makes of a prompt, for retrieval by it. Steps without
// scheduler or sampling, several prompts in each.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "runtime/step_pipeline.h"

namespace trireme {

// The hidden state of each prompt's last token behind the final norm, in order: state(prompt,
// hidden [H]). The bits depend on the prompt and the layout alone. InvalidArgument when a prompt is
// empty or does not fit. REQUIRES: nothing else uses the worker, and it has as many logit rows
// as sequences.
absl::Status HiddenStates(Worker& worker, StepPipeline& pipeline,
                          const std::vector<std::vector<TokenId>>& prompts,
                          const std::function<void(int64_t, std::span<const float>)>& state);

}  // namespace trireme
