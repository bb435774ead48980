#include "launch/command_flags.h"

#include <charconv>
#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "launch/doctor.h"
#include "models/checkpoint_maker.h"
#include "models/mol_checkpoint.h"

namespace trireme {
namespace {

// CLI11's own say "Value 0 not in range 0.000000 to 1797..." with 309 digits, and take NaN for a
// number within any range.
CLI::Validator NumberThat(std::function<bool(double)> fits, const std::string& must,
                          const std::string& name) {
  return CLI::Validator(
      [fits = std::move(fits), must](std::string& text) {
        double value = 0.0;
        const bool number = CLI::detail::lexical_cast(text, value) && std::isfinite(value);
        return number && fits(value) ? std::string() : "must be " + must + ", not " + text;
      },
      name);
}
const CLI::Validator kPositive =
    NumberThat([](double x) { return x > 0.0; }, "a positive number", "POSITIVE");
const CLI::Validator kNotNegative =
    NumberThat([](double x) { return x >= 0.0; }, "0 or more", "NONNEGATIVE");

// CLI11 would take -1 as 2^64 - 1, 010 as 8 and what is above 2^64 - 1 as that.
const CLI::Validator kSeed(
    [](std::string& text) {
      uint64_t seed = 0;
      const char* const end = text.data() + text.size();
      const auto [stopped_at, error] = std::from_chars(text.data(), end, seed);
      if (error != std::errc() || stopped_at != end)
        return "must be an integer from 0 to 18446744073709551615, not " + text;
      text = std::to_string(seed);
      return std::string();
    },
    "SEED");

// Less would take the scheduler's delays on a busy host for failures.
constexpr double kShortestTimeout = 0.1, kLongestTimeout = 86400.0;
const CLI::Validator kTimeoutOrOff = NumberThat(
    [](double x) { return x == 0.0 || (x >= kShortestTimeout && x <= kLongestTimeout); },
    absl::StrCat("0 or from ", kShortestTimeout, " to ", kLongestTimeout, " seconds"), "SECONDS");

void AddModelFlags(CLI::App* app, ModelFlags* flags) {
  app->option_defaults()->group("Model and layout");
  app->add_option("MODEL_DIR", flags->model_dir, "Folder with config.json and safetensors weights")
      ->required();
  app->add_option("--tp,--tensor-parallel-size", flags->tp,
                  "Tensor-parallel ranks (default: from the world size)")
      ->check(kPositive);
  app->add_option("--pp,--pipeline-parallel-size", flags->pp,
                  "Pipeline stages (default: what the world size leaves)")
      ->check(kPositive);
  app->add_option("--dp,--data-parallel-size", flags->dp, "Replicas (default: what is left)")
      ->check(kPositive);
  app->add_option("--pp-split", flags->pp_split,
                  "Layers of each pipeline stage, e.g. 9,7 (default: balanced)");
  app->add_option("--dtype", flags->dtype, "auto (the checkpoint's), f32, bf16 or f16")
      ->capture_default_str();
  app->add_option("--quantization", flags->quantization,
                  "none; fp8: the linear layers' weights as e4m3, quantised while loading; or "
                  "fp8-dynamic: their activations too, each token's as it comes")
      ->capture_default_str();
}

void AddServingFlags(CLI::App* app, ServingFlags* flags) {
  app->option_defaults()->group("Scheduling");
  app->add_option("--policy", flags->policy,
                  "continuous; dynamic or static batches wait for each other, to compare with")
      ->capture_default_str();
  app->add_flag("--no-prefix-cache", flags->no_prefix_cache,
                "Compute equal beginnings of prompts each time");
  app->add_flag("--no-overlap", flags->no_overlap,
                "Do not plan a step while the one before is executed");
  app->add_option("--ageing-steps", flags->ageing_steps,
                  "Steps of waiting that make up for one priority")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--max-queue", flags->max_queue,
                  "Samples (n a request) beyond --max-num-seqs that may be open; 0 = no limit")
      ->capture_default_str()
      ->check(kNotNegative);
  app->add_option("--metrics", flags->metrics_file,
                  "Write counters and histograms to this file, as Prometheus text");
  app->add_option("--trace", flags->trace_file,
                  "Write what each rank did when, as a Chrome trace (chrome://tracing, Perfetto)");
}

void AddSamplingFlags(CLI::App* app, GenerateFlags* flags) {
  SamplingParams* s = &flags->sampling;
  app->option_defaults()->group("Sampling");
  app->add_option("--temperature", s->temperature, "0 = greedy")->capture_default_str();
  app->add_option("--top-k", s->top_k, "Keep the k most likely tokens; 0 = all")
      ->capture_default_str();
  app->add_option("--top-p", s->top_p, "Keep the smallest set of tokens with this probability")
      ->capture_default_str();
  app->add_option("--min-p", s->min_p, "Keep tokens at least this share as likely as the best")
      ->capture_default_str();
  app->add_option("--repetition-penalty", s->repetition_penalty,
                  "Above 1 discourages tokens already seen")
      ->capture_default_str();
  app->add_option("--presence-penalty", s->presence_penalty,
                  "Subtracted from tokens already produced")
      ->capture_default_str();
  app->add_option("--frequency-penalty", s->frequency_penalty, "Subtracted per occurrence")
      ->capture_default_str();
  app->add_option("--seed", s->seed, "Same seed, same tokens")
      ->capture_default_str()
      ->transform(kSeed);
}

}  // namespace

CLI::Validator PositiveNumber() { return kPositive; }
CLI::Validator SeedNumber() { return kSeed; }
CLI::Validator NotNegativeNumber() { return kNotNegative; }
CLI::Validator NumberBetween(double low, double high) {
  return NumberThat([low, high](double x) { return x >= low && x <= high; },
                    absl::StrCat("from ", low, " to ", high),
                    absl::StrCat("[", low, ", ", high, "]"));
}

void AddJobFlags(CLI::App* app, JobFlags* flags) {
  app->option_defaults()->group("Several ranks");
  app->add_option("--failure-timeout", flags->failure_timeout,
                  "Seconds of silence or standstill of a rank that end the job; 0: nobody watches")
      ->capture_default_str()
      ->check(kTimeoutOrOff);
  app->add_option("--start-timeout", flags->start_timeout,
                  "Seconds that a rank waits in MPI_Init for the others to start")
      ->capture_default_str()
      ->check(NumberBetween(kShortestTimeout, kLongestTimeout));
  app->add_option("--flight-records", flags->flight_records,
                  "Folder for the ranks' last calls when the job fails (default: TMPDIR or /tmp; "
                  "none: not written)");
  app->add_option("--ranks", flags->ranks, "Start this many ranks on this machine, with mpirun")
      ->check(CLI::Range(1, 4096));
  app->add_option("--journal", flags->journal)->group("");
  app->add_option("--history", flags->history)->group("");
}

void AddRunFlags(CLI::App* app, ModelFlags* flags, JobFlags* job) {
  AddModelFlags(app, flags);
  if (job != nullptr) AddJobFlags(app, job);
  app->option_defaults()->group("Memory and batching");
  app->add_option("--device", flags->device, "auto (cuda where all ranks have it), cpu or cuda")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app->add_option(
         "--collectives", flags->collectives,
         "How GPU tensors move between ranks: auto (NCCL, and small sums through the GPUs' "
         "memory where that is faster), nccl (alone), or host (through host memory)")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "nccl", "host"}));
  app->add_flag("--allow-shared-gpu", flags->allow_shared_gpu,
                "Let several ranks use one GPU (slow, for tests)");
  app->add_flag(
      "--no-graphs", flags->no_graphs,
      "Enqueue every decode step anew instead of replaying CUDA graphs captured at start");
  app->add_flag(
      "--dependent-launches", flags->dependent_launches,
      "On GPUs of 9.0 and later: let each kernel's blocks come before the kernel ahead of "
      "it has ended (programmatic dependent launch; not measured yet)");
  app->add_option("--matmul", flags->matmul,
                  "On GPUs: own kernels (a prompt's bits do not depend on what else is in the "
                  "batch), or cublaslt for matmuls of more than 16 rows (then they may; not "
                  "measured yet)")
      ->capture_default_str()
      ->check(CLI::IsMember({"own", "cublaslt"}));
  app->add_option("--threads", flags->threads,
                  "Threads a rank (default: cores of the host / ranks on it)")
      ->check(NumberBetween(1, 1024));
  app->add_option("--max-model-len", flags->max_model_len,
                  "Tokens of prompt and output together (default: the model's)")
      ->check(kPositive);
  app->add_option("--max-num-seqs", flags->max_num_seqs, "Sequences running at once")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  app->add_option("--max-num-batched-tokens", flags->max_num_batched_tokens,
                  "Tokens of a micro-batch")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  app->add_option("--page-size", flags->page_size, "Tokens of a KV cache page")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app->add_option("--kv-cache-memory", flags->kv_cache_memory,
                  "Bytes of KV cache a rank may hold, e.g. 2GiB (default: what the requests need)");
  app->add_option(
      "--memory-limit", flags->memory_limit,
      "Bytes a rank may hold in all, e.g. 8GiB: the KV cache gets what is left (on GPUs "
      "graphs come on top)");
}

void AddGenerate(CLI::App& app, GenerateFlags* flags, JobFlags* job) {
  CLI::App* command = app.add_subcommand("generate", "Generate text from one or more prompts");
  AddRunFlags(command, &flags->model, job);
  command
      ->add_option("--max-restarts", job->max_restarts,
                   "With --ranks: start again this often after a rank has failed; requests go on "
                   "where they were")
      ->check(CLI::Range(0, 1'000'000));
  AddServingFlags(command, &flags->serving);
  command->option_defaults()->group("Prompts");
  command->add_option("--prompt", flags->prompts, "Prompt (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);  // one value a flag, as it is: "[INST] a, b" is no list
  command->add_option("--prompts", flags->prompts_file,
                      "File with one prompt a line, or JSON lines when it ends in .jsonl");
  command
      ->add_option("--prompt-ids", flags->prompt_ids,
                   "Token ids instead of text, e.g. 1,5,9 (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);  // one value a flag, as it is: "[INST] a, b" is no list
  command->option_defaults()->group("Answers");
  command->add_option("--max-tokens", flags->max_tokens, "Tokens to generate at most")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->add_option("--n", flags->n, "Answers to each prompt; the i-th draws with seed + i")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  command
      ->add_option("--priority", flags->priority, "The higher one runs first; waiting catches up")
      ->capture_default_str()
      ->check(CLI::Range(-1000, 1000));
  command->add_option("--stop", flags->stop, "End the answer at this text (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);  // one value a flag, as it is: "[INST] a, b" is no list
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on after the end-of-sequence token");
  command->add_flag("--json", flags->json, "One JSON object a line");
  command
      ->add_option("--logprobs", flags->sampling.logprobs,
                   "With --json: log-probability of each token and of the N best")
      ->check(CLI::Range(0, kMaxLogprobs));
  command->add_flag("--echo", flags->echo, "Print the prompt before the answer");
  AddSamplingFlags(command, flags);
}

void AddEval(CLI::App& app, EvalFlags* flags, JobFlags* job) {
  CLI::App* command =
      app.add_subcommand("eval", "Mean negative log likelihood per token of a text");
  AddRunFlags(command, &flags->model, job);
  command->option_defaults()->group("Evaluation");
  command->add_option("--text", flags->text_file, "UTF-8 text file");
  command->add_option("--ids", flags->ids_file, "File of token ids");
  command->add_option("--logits-out", flags->logits_out,
                      "Write the logits of every position, [T, V] f32, to this .safetensors file");
  command->add_flag("--json", flags->json, "Print a JSON object");
}

void AddBench(CLI::App* command, BenchFlags* flags, JobFlags* job) {
  AddRunFlags(command, &flags->model, job);
  command->option_defaults()->group("Workload and result");
  command->add_option("--input-len", flags->input_len, "Prompt tokens")
      ->capture_default_str()
      ->check(kPositive);
  command->add_option("--output-len", flags->output_len, "Generated tokens")
      ->capture_default_str()
      ->check(kPositive);
  command->add_option("--warmup", flags->warmup, "Iterations before measuring")
      ->capture_default_str()
      ->check(kNotNegative);
  command->add_option("--iterations", flags->iterations, "Measured iterations")
      ->capture_default_str()
      ->check(kPositive);
  command->add_option("--save", flags->save, "Write the result as JSON");
  command->add_option("--compare", flags->compare,
                      "Compare with a saved result; exit status 1 on a regression");
  command
      ->add_option("--tolerance", flags->tolerance, "Relative change that counts as a regression")
      ->capture_default_str()
      ->check(kNotNegative);
}

void AddBenchServing(CLI::App* command, BenchServingFlags* flags, JobFlags* job) {
  AddRunFlags(command, &flags->model, job);
  AddServingFlags(command, &flags->serving);
  command->option_defaults()->group("Workload");
  command
      ->add_option("--policies", flags->policies,
                   "Policies to run one after the other on the same requests")
      ->delimiter(',')
      ->capture_default_str();
  CLI::Option* recorded = command->add_option(
      "--arrivals", flags->arrivals_file,
      "Replay a recording instead of drawing requests: JSON lines with at (seconds), prompt_tokens "
      "and max_tokens, in order");
  command->add_option("--num-prompts", flags->num_prompts, "Requests")
      ->capture_default_str()
      ->check(kPositive)
      ->excludes(recorded);
  command->add_option("--min-len", flags->min_len, "Shortest prompt and output, tokens")
      ->capture_default_str()
      ->check(kPositive)
      ->excludes(recorded);
  command->add_option("--max-len", flags->max_len, "Longest; lengths are log-uniform between")
      ->capture_default_str()
      ->check(kPositive)
      ->excludes(recorded);
  command
      ->add_option("--shared-prefix", flags->shared_prefix,
                   "Tokens that all prompts begin with, besides")
      ->capture_default_str()
      ->check(kNotNegative)
      ->excludes(recorded);
  command
      ->add_option("--request-rates", flags->request_rates,
                   "Poisson arrivals a second, one run each (default: all at once)")
      ->delimiter(',')
      ->check(kPositive)
      ->excludes(recorded);
  command
      ->add_option("--slo-first-token-ms", flags->slo_first_token_ms,
                   "For the goodput: the longest wait for the first token (TTFT)")
      ->capture_default_str()
      ->check(kPositive);
  command
      ->add_option("--slo-time-per-output-token-ms", flags->slo_time_per_output_token_ms,
                   "And the longest mean gap between a request's tokens, the first excluded (TPOT)")
      ->capture_default_str()
      ->check(kPositive);
  command->add_option("--seed", flags->seed, "Of lengths, tokens and arrivals")
      ->capture_default_str()
      ->transform(kSeed);
}

CLI::App* AddDoctor(CLI::App& app, DoctorFlags* flags) {
  CLI::App* command = app.add_subcommand(
      "doctor", "Say what is wrong with this machine and how the job was started");
  command->add_option("MODEL_DIR", flags->model_dir, "Compare this checkpoint between hosts too");
  const auto size = [command](const char* names, int* value, const char* what) {
    command->add_option(names, *value, what)->check(kPositive);
  };
  size("--tp,--tensor-parallel-size", &flags->tp, "Tensor-parallel ranks of the job meant");
  size("--pp,--pipeline-parallel-size", &flags->pp, "Its pipeline stages");
  size("--dp,--data-parallel-size", &flags->dp, "Its replicas");
  command->add_option("--device", flags->device, "auto, cpu or cuda")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--hostfile", flags->hostfile, "Check this file for mpirun --hostfile");
  command->add_flag("--json", flags->json, "Print a JSON object, with all that was looked at");
  return command;
}

std::string RecipeNames() {
  std::string names;
  for (const std::string& name : CheckpointRecipeNames())
    names += (names.empty() ? "" : ", ") + name;
  for (const std::string& name : MolRecipeNames()) names += ", " + name;
  return names;
}

}  // namespace trireme
