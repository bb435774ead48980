#include "launch/prompt_queries.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "launch/command_flags.h"
#include "launch/prompts.h"
#include "launch/session.h"
#include "runtime/hidden_states.h"
#include "runtime/wire.h"

namespace trireme {

void AddEmbedderFlags(CLI::App* app, EmbedderFlags* flags) {
  app->option_defaults()->group("Queries out of prompts");
  app->add_option("--embedder", flags->model.model_dir,
                  "Language model whose hidden states are the queries, in place of --queries");
  app->add_option("--prompt", flags->prompts, "Text to find items for (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  app->add_option("--prompts", flags->prompts_file,
                  "File with one prompt a line, or JSON lines when it ends in .jsonl");
  app->add_option("--tp,--tensor-parallel-size", flags->model.tp,
                  "Of the embedder: tensor-parallel ranks (default: from the world size)")
      ->check(PositiveNumber());
  app->add_option("--pp,--pipeline-parallel-size", flags->model.pp,
                  "Of the embedder: pipeline stages (default: what the world size leaves)")
      ->check(PositiveNumber());
  app->add_option("--dtype", flags->model.dtype,
                  "Of the embedder: auto (the checkpoint's), f32, bf16 or f16")
      ->capture_default_str();
}

absl::StatusOr<std::vector<std::vector<TokenId>>> ReadPrompts(const EmbedderFlags& flags) {
  if (flags.prompts.empty() && flags.prompts_file.empty())
    return UsageError("--embedder: give --prompt TEXT or --prompts FILE");
  GenerateFlags generate;
  generate.model = flags.model;
  generate.prompts = flags.prompts;
  generate.prompts_file = flags.prompts_file;
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model.model_dir));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(flags.model.model_dir);
  if (!tokenizer.ok() && !absl::IsNotFound(tokenizer.status())) return tokenizer.status();
  ASSIGN_OR_RETURN(std::vector<PromptRequest> requests,
                   CollectRequests(generate, config, tokenizer.ok() ? tokenizer->get() : nullptr));
  std::vector<std::vector<TokenId>> prompts;
  for (PromptRequest& prompt : requests) prompts.push_back(std::move(prompt.request.prompt));
  return prompts;
}

absl::StatusOr<std::vector<RetrievalQuery>> EmbedPrompts(
    ControlPlane& control, const ModelFlags& model, int64_t query_dim,
    const std::vector<std::vector<TokenId>>& prompts) {
  ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control, model));
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(model.model_dir);
  absl::Status status = config.status();
  if (status.ok() && config->hidden_size != query_dim) {
    status = absl::InvalidArgumentError(absl::StrCat(
        "--embedder ", model.model_dir, ": its hidden states have ", config->hidden_size,
        " elements; the retrieval model's query_dim is ", query_dim));
  }
  RETURN_IF_ERROR(control.Agree(status));
  // Rank 0 alone knows the prompts.
  int64_t longest = 1;
  for (const std::vector<TokenId>& prompt : prompts)
    longest = std::max(longest, static_cast<int64_t>(prompt.size()));
  ByteWriter out;
  out.Put(longest);
  out.Put(std::clamp<int64_t>(static_cast<int64_t>(prompts.size()), 1, model.max_num_seqs));
  std::string bytes = out.Take();
  control.Broadcast(&bytes);
  ByteReader in(bytes);
  Demand demand;
  demand.max_sequence_tokens = in.Get<int64_t>();
  demand.sequences = demand.logit_rows = in.Get<int64_t>();
  ASSIGN_OR_RETURN(const std::unique_ptr<Worker> worker,
                   LoadWorker(control, topology, model, demand));
  std::vector<RetrievalQuery> queries(prompts.size());
  if (control.rank() == 0) {
    StepPipeline pipeline(*worker);
    status = HiddenStates(*worker, pipeline, prompts,
                          [&](int64_t prompt, std::span<const float> hidden) {
                            queries[prompt].embedding.assign(hidden.begin(), hidden.end());
                          });
  } else if (control.rank() == worker->leader()) {
    StepPipeline idle(*worker);  // the other replicas have nothing to do
  } else {
    status = worker->Run();
  }
  RETURN_IF_ERROR(control.Agree(status));
  return queries;
}

}  // namespace trireme
