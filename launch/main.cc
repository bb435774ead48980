// trireme: parses the command line on every rank, starts the job's one MPI session and runs the
// command. Exit status: 0 done, 1 failure, 2 usage, 130 interrupted. Rank 0 alone speaks, in one
// line.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <functional>
#include <new>
#include <string>

#include "CLI/CLI.hpp"
#include "launch/commands.h"
#include "models/checkpoint_maker.h"

namespace trireme {
namespace {

volatile std::sig_atomic_t g_speaks = 1;  // only rank 0 does

// Everything that was promised is already written: output is flushed as it is produced, and files
// get their names last.
extern "C" void OnInterrupt(int) {
  static const char line[] = "\ntrireme: interrupted\n";
  if (g_speaks != 0) {
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line, sizeof(line) - 1);
  }
  _exit(130);
}

void AddModelFlags(CLI::App* app, ModelFlags* flags) {
  app->option_defaults()->group("Model and layout");
  app->add_option("MODEL_DIR", flags->model_dir, "Folder with config.json and safetensors weights")
      ->required();
  app->add_option("--tp,--tensor-parallel-size", flags->tp,
                  "Tensor-parallel ranks (default: from the world size)")
      ->check(CLI::PositiveNumber);
  app->add_option("--pp,--pipeline-parallel-size", flags->pp,
                  "Pipeline stages (default: what the world size leaves)")
      ->check(CLI::PositiveNumber);
  app->add_option("--dp,--data-parallel-size", flags->dp, "Replicas (default: what is left)")
      ->check(CLI::PositiveNumber);
  app->add_option("--dtype", flags->dtype, "auto (the checkpoint's), f32, bf16 or f16")
      ->capture_default_str();
}

void AddRunFlags(CLI::App* app, ModelFlags* flags) {
  AddModelFlags(app, flags);
  app->option_defaults()->group("Memory and batching");
  app->add_option("--device", flags->device, "auto, cpu or cuda")->capture_default_str();
  app->add_option("--threads", flags->threads,
                  "Threads a rank (default: cores of the host / ranks on it)")
      ->check(CLI::PositiveNumber);
  app->add_option("--max-model-len", flags->max_model_len,
                  "Tokens of prompt and output together (default: the model's)")
      ->check(CLI::PositiveNumber);
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
  app->add_option("--seed", s->seed, "Same seed, same tokens")->capture_default_str();
}

void AddGenerate(CLI::App& app, GenerateFlags* flags) {
  CLI::App* command = app.add_subcommand("generate", "Generate text from one or more prompts");
  AddRunFlags(command, &flags->model);
  command->option_defaults()->group("Prompts");
  command->add_option("--prompt", flags->prompts, "Prompt (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--prompts", flags->prompts_file,
                      "File with one prompt a line, or JSON lines when it ends in .jsonl");
  command
      ->add_option("--prompt-ids", flags->prompt_ids,
                   "Token ids instead of text, e.g. 1,5,9 (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->option_defaults()->group("Answers");
  command->add_option("--max-tokens,-n", flags->max_tokens, "Tokens to generate at most")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->add_option("--stop", flags->stop, "End the answer at this text (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on after the end-of-sequence token");
  command->add_flag("--json", flags->json, "One JSON object a line");
  command->add_option("--logprobs", flags->sampling.logprobs,
                      "With --json: log-probability of each token and of the N best");
  command->add_flag("--echo", flags->echo, "Print the prompt before the answer");
  AddSamplingFlags(command, flags);
}

void AddEval(CLI::App& app, EvalFlags* flags) {
  CLI::App* command =
      app.add_subcommand("eval", "Mean negative log likelihood per token of a text");
  AddRunFlags(command, &flags->model);
  command->option_defaults()->group("Evaluation");
  command->add_option("--text", flags->text_file, "UTF-8 text file");
  command->add_option("--ids", flags->ids_file, "File of token ids");
  command->add_option("--logits-out", flags->logits_out,
                      "Write the logits of every position, [T, V] f32, to this .safetensors file");
  command->add_flag("--json", flags->json, "Print a JSON object");
}

void AddBench(CLI::App* command, BenchFlags* flags) {
  AddRunFlags(command, &flags->model);
  command->option_defaults()->group("Workload and result");
  command->add_option("--input-len", flags->input_len, "Prompt tokens")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--output-len", flags->output_len, "Generated tokens")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--warmup", flags->warmup, "Iterations before measuring")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--iterations", flags->iterations, "Measured iterations")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--save", flags->save, "Write the result as JSON");
  command->add_option("--compare", flags->compare,
                      "Compare with a saved result; exit status 1 on a regression");
  command
      ->add_option("--tolerance", flags->tolerance, "Relative change that counts as a regression")
      ->capture_default_str();
}

std::string RecipeNames() {
  std::string names;
  for (const std::string& name : CheckpointRecipeNames())
    names += (names.empty() ? "" : ", ") + name;
  return names;
}

// Exit status of a parse error or of --help / --version; rank 0 prints.
int ReportParse(const CLI::App& app, const CLI::ParseError& error, bool speaks) {
  if (error.get_exit_code() == 0) {
    if (speaks) app.exit(error);
    return 0;
  }
  if (speaks) std::fprintf(stderr, "trireme: %s; see trireme --help\n", error.what());
  return 2;
}

int Main(int argc, char** argv) {
  CLI::App app("Trireme: distributed inference, tensor x pipeline x data parallel over MPI ranks",
               "trireme");
  app.set_version_flag("--version", std::string("trireme ") + TRIREME_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  GenerateFlags generate;
  EvalFlags eval;
  InspectFlags inspect;
  MakeCheckpointFlags make;
  BenchFlags bench;
  AddGenerate(app, &generate);
  AddEval(app, &eval);
  CLI::App* inspect_command = app.add_subcommand(
      "inspect", "Show a checkpoint's architecture and the bytes each rank will hold");
  AddModelFlags(inspect_command, &inspect.model);
  inspect_command->add_flag("--json", inspect.json, "Print a JSON object");
  CLI::App* make_command = app.add_subcommand(
      "make-checkpoint", "Write random weights in the shapes of a well-known model");
  make_command->add_option("--like", make.like, "One of: " + RecipeNames())->required();
  make_command->add_option("--layers", make.layers, "Layers (default: the model's)")
      ->check(CLI::PositiveNumber);
  make_command->add_option("--dtype", make.dtype, "bf16, f16 or f32")->capture_default_str();
  make_command->add_option("--seed", make.seed, "Same seed, same bytes")->capture_default_str();
  make_command->add_option("OUT", make.out_dir, "Folder to write; must not hold anything")
      ->required();
  CLI::App* bench_command =
      app.add_subcommand("bench", "Measure speed against the machine's own ceilings");
  bench_command->require_subcommand(1);
  CLI::App* latency = bench_command->add_subcommand(
      "latency", "One batch at a time: time to first token and per token");
  AddBench(latency, &bench);
  latency->add_option("--batch-size", bench.batch_size, "Sequences of the batch")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  CLI::App* throughput =
      bench_command->add_subcommand("throughput", "Many requests at once: tokens per second");
  AddBench(throughput, &bench);
  throughput->add_option("--num-prompts", bench.num_prompts, "Requests")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);

  // Parsing comes before MPI so that the arguments are the program's own; only rank 0 may speak of
  // errors, though.
  std::function<int(bool)> parse_failure;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    parse_failure = [&app, error](bool speaks) { return ReportParse(app, error, speaks); };
  }
  absl::StatusOr<std::unique_ptr<ControlPlane>> control = ControlPlane::Start(nullptr, nullptr);
  if (!control.ok()) {
    std::fprintf(stderr, "trireme: %s\n", std::string(control.status().message()).c_str());
    return 1;
  }
  g_speaks = (*control)->rank() == 0;
  if (parse_failure) return parse_failure((*control)->rank() == 0);
  std::signal(SIGINT, OnInterrupt);
  std::signal(SIGTERM, OnInterrupt);
  std::signal(SIGPIPE, SIG_IGN);

  absl::Status status;
  try {
    if (app.got_subcommand("generate")) status = RunGenerate(**control, generate);
    if (app.got_subcommand("eval")) status = RunEval(**control, eval);
    if (app.got_subcommand("inspect")) status = RunInspect(**control, inspect);
    if (app.got_subcommand("make-checkpoint")) status = RunMakeCheckpoint(**control, make);
    if (latency->parsed()) status = RunBenchLatency(**control, bench);
    if (throughput->parsed()) status = RunBenchThroughput(**control, bench);
  } catch (const std::bad_alloc&) {
    // The other ranks may be waiting for this one.
    std::fprintf(stderr, "trireme: rank %d: out of memory\n", (*control)->rank());
    (*control)->Abort(1);
  }
  if (status.ok()) return 0;
  // mpirun terminates the others as soon as one rank has left: no second line for that.
  std::signal(SIGTERM, SIG_IGN);
  if ((*control)->rank() == 0)
    std::fprintf(stderr, "trireme: %s\n", std::string(status.message()).c_str());
  return IsUsageError(status) ? 2 : 1;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
