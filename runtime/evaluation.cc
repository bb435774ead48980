#include "runtime/evaluation.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace trireme {

absl::Status Evaluate(Worker& worker, StepPipeline& pipeline, const std::vector<TokenId>& tokens,
                      const std::function<void(int64_t, std::span<const float>)>& row) {
  CHECK(pipeline.empty());
  const WorkerOptions& options = worker.options();
  const int64_t total = static_cast<int64_t>(tokens.size());
  const int64_t pages = (total + options.page_size - 1) / options.page_size;
  if (total > options.max_model_len || pages > options.num_pages) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", total, " tokens; at most ",
                     std::min(options.max_model_len, options.num_pages * options.page_size),
                     " fit (--max-model-len)"));
  }
  const int64_t chunk_tokens = std::min(options.max_num_batched_tokens, options.max_logit_rows);
  const int64_t vocabulary = worker.config().vocab_size;
  const int64_t depth = worker.groups().topology.pp_size;
  int64_t next = 0, step = 0, delivered = 0;
  StepResult result;
  while (delivered < total) {
    while (next < total && pipeline.in_flight() < depth) {
      StepPlan plan;
      plan.step = step++;
      if (next == 0)
        plan.new_sequences.push_back(
            {.slot = 0, .prompt_tokens = static_cast<int32_t>(total), .sampling = {}});
      Chunk chunk{.slot = 0, .position = static_cast<int32_t>(next), .logit_rows = LogitRows::kAll};
      const int64_t end = std::min(total, next + chunk_tokens);
      chunk.num_tokens = static_cast<int32_t>(end - next);
      plan.tokens.assign(tokens.begin() + next, tokens.begin() + end);
      chunk.page_index = static_cast<int32_t>((next + options.page_size - 1) / options.page_size);
      for (int64_t page = chunk.page_index; page <= (end - 1) / options.page_size; ++page) {
        plan.pages.push_back(static_cast<int32_t>(page));
        ++chunk.num_pages;
      }
      next = end;
      plan.chunks.push_back(chunk);
      pipeline.Dispatch(plan);
    }
    pipeline.Take(&result);
    if (!result.error.empty()) return absl::AbortedError(result.error);
    const int64_t rows = static_cast<int64_t>(result.logits.size()) / vocabulary;
    CHECK(rows > 0 && delivered + rows <= next);
    for (int64_t r = 0; r < rows; ++r)
      row(delivered + r, std::span(result.logits).subspan(r * vocabulary, vocabulary));
    delivered += rows;
  }
  return absl::OkStatus();
}

}  // namespace trireme
