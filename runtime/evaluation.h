// Logits of given tokens, for scoring: the model's steps without scheduler or sampling.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "runtime/step_pipeline.h"

namespace trireme {

// Logits of every position of `tokens` [T], one row at a time, in order: row(position, logits [V]).
// REQUIRES: nothing else uses the worker. InvalidArgument when the sequence does not fit.
absl::Status Evaluate(Worker& worker, StepPipeline& pipeline, const std::vector<TokenId>& tokens,
                      const std::function<void(int64_t, std::span<const float>)>& row);

}  // namespace trireme
