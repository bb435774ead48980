#include "runtime/hidden_states.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {
namespace {

// Cuts prompts into steps. Prompt i has slot i % slots and that slot's pages: steps are computed in
// order, so what a slot held before is done with when the next prompt begins.
class PromptSteps {
 public:
  PromptSteps(const WorkerOptions& options, const std::vector<std::vector<TokenId>>& prompts)
      : options_(options), prompts_(prompts) {}

  absl::Status Check() {
    int64_t longest = 1;
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const auto tokens = static_cast<int64_t>(prompts_[i].size());
      const int64_t most =
          std::min(options_.max_model_len, options_.num_pages * options_.page_size);
      if (tokens == 0 || tokens > most) {
        return absl::InvalidArgumentError(absl::StrCat("prompt ", i + 1, " of ", prompts_.size(),
                                                       ": has ", tokens, " tokens; must be 1 to ",
                                                       most, " (--max-model-len)"));
      }
      longest = std::max(longest, tokens);
    }
    pages_ = (longest + options_.page_size - 1) / options_.page_size;
    slots_ =
        std::min({options_.max_num_seqs, options_.max_logit_rows, options_.num_pages / pages_});
    return absl::OkStatus();
  }

  bool done() const { return next_ == prompts_.size(); }
  StepPlan Next() {
    StepPlan plan;
    plan.step = step_++;
    int64_t room = options_.max_num_batched_tokens;
    while (!done() && room > 0 && static_cast<int64_t>(plan.chunks.size()) < slots_)
      room -= AddChunk(room, &plan);
    return plan;
  }

 private:
  int64_t AddChunk(int64_t room, StepPlan* plan) {
    const std::vector<TokenId>& prompt = prompts_[next_];
    const auto total = static_cast<int64_t>(prompt.size());
    const int64_t count = std::min(room, total - position_), end = position_ + count;
    const auto slot = static_cast<int32_t>(static_cast<int64_t>(next_) % slots_);
    if (position_ == 0) {
      plan->new_sequences.push_back(
          {.slot = slot, .prompt_tokens = static_cast<int32_t>(total), .sampling = {}});
    }
    Chunk chunk{.slot = slot,
                .position = static_cast<int32_t>(position_),
                .num_tokens = static_cast<int32_t>(count),
                .logit_rows = end == total ? LogitRows::kHidden : LogitRows::kNone};
    plan->tokens.insert(plan->tokens.end(), prompt.begin() + position_, prompt.begin() + end);
    const int64_t page_size = options_.page_size;
    chunk.page_index = static_cast<int32_t>((position_ + page_size - 1) / page_size);
    for (int64_t page = chunk.page_index; page <= (end - 1) / page_size; ++page) {
      plan->pages.push_back(static_cast<int32_t>(slot * pages_ + page));
      ++chunk.num_pages;
    }
    plan->chunks.push_back(chunk);
    position_ = end;
    if (end == total) ++next_, position_ = 0;
    return count;
  }

  const WorkerOptions& options_;
  const std::vector<std::vector<TokenId>>& prompts_;
  int64_t pages_ = 1, slots_ = 1;  // of a slot; of the worker that are used
  size_t next_ = 0;                // prompt
  int64_t position_ = 0;           // in it
  int64_t step_ = 0;
};

}  // namespace

absl::Status HiddenStates(Worker& worker, StepPipeline& pipeline,
                          const std::vector<std::vector<TokenId>>& prompts,
                          const std::function<void(int64_t, std::span<const float>)>& state) {
  CHECK(pipeline.empty());
  PromptSteps steps(worker.options(), prompts);
  RETURN_IF_ERROR(steps.Check());
  const int64_t hidden = worker.config().hidden_size;
  const int64_t depth = worker.groups().topology.pp_size;
  int64_t delivered = 0;
  StepResult result;
  while (!steps.done() || !pipeline.empty()) {
    while (!steps.done() && pipeline.in_flight() < depth) pipeline.Dispatch(steps.Next());
    pipeline.Take(&result);
    if (!result.error.empty()) return absl::AbortedError(result.error);
    for (size_t at = 0; at < result.hidden.size(); at += hidden)
      state(delivered++, std::span<const float>(result.hidden).subspan(at, hidden));
  }
  CHECK_EQ(delivered, static_cast<int64_t>(prompts.size()));
  return absl::OkStatus();
}

}  // namespace trireme
