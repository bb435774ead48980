// trireme eval: mean negative log likelihood per token of a text, and the logits of every position.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/output_files.h"
#include "launch/prompts.h"
#include "launch/session.h"
#include "models/safetensors.h"
#include "nlohmann/json.hpp"
#include "runtime/evaluation.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr int64_t kRowsAtOnce =
    128;  // bounds the logits in flight: 128 rows of a 128k vocabulary are 64 MiB

// -log softmax(logits)[token], summed in double.
double NegativeLogLikelihood(std::span<const float> logits, TokenId token) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - max);
  return std::log(sum) + max - logits[token];
}

absl::StatusOr<std::vector<TokenId>> ReadTokens(const EvalFlags& flags) {
  const bool text = !flags.text_file.empty();
  const std::string& file = text ? flags.text_file : flags.ids_file;
  ASSIGN_OR_RETURN(const std::string content, ReadFile(file));
  std::vector<TokenId> tokens;
  if (text) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer,
                     Tokenizer::Load(flags.model.model_dir));
    absl::StatusOr<std::vector<TokenId>> ids = tokenizer->Encode(content);
    if (!ids.ok())
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": ", std::string(ids.status().message())));
    tokens = *std::move(ids);
  } else {
    ASSIGN_OR_RETURN(tokens, ParseTokenIds(file, content));
  }
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model.model_dir));
  for (const TokenId token : tokens) {
    if (token >= config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(file, ": token id ", token,
                                                     " is outside the model's vocabulary (0 to ",
                                                     config.vocab_size - 1, ")"));
    }
  }
  if (tokens.size() < 2)
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": needs at least two tokens to score one"));
  return tokens;
}

// Null when no logits are asked for. Opened before the model is loaded, so that a bad path costs no
// time.
absl::StatusOr<std::unique_ptr<SafetensorsWriter>> OpenLogits(ControlPlane& control,
                                                              const EvalFlags& flags,
                                                              int64_t rows) {
  if (flags.logits_out.empty()) return nullptr;
  RETURN_IF_ERROR(CheckOutputFiles({{"--logits-out", flags.logits_out}},
                                   {{"--text", flags.text_file}, {"--ids", flags.ids_file}},
                                   flags.model.model_dir));
  const FlightRecorder::Outside outside(control.recorder());  // a pipe waits for its reader
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model.model_dir));
  return SafetensorsWriter::Create(flags.logits_out,
                                   {{"logits", DType::kF32, {rows, config.vocab_size}}});
}

struct Score {
  double nll = 0.0;
  int64_t scored = 0;
};

// Texts longer than the model are scored in windows, each on its own; a window's first token is not
// scored.
absl::StatusOr<Score> ScoreTokens(Worker& worker, const std::vector<TokenId>& tokens,
                                  SafetensorsWriter* writer) {
  StepPipeline pipeline(worker);
  Score score;
  absl::Status written;
  const WorkerOptions& options = worker.options();
  const int64_t window = std::min(options.max_model_len, options.num_pages * options.page_size);
  const int64_t total = static_cast<int64_t>(tokens.size());
  for (int64_t begin = 0; begin < total; begin += window) {
    const int64_t end = std::min(total, begin + window);
    const std::vector<TokenId> part(tokens.begin() + begin, tokens.begin() + end);
    RETURN_IF_ERROR(
        Evaluate(worker, pipeline, part, [&](int64_t position, std::span<const float> logits) {
          if (position + 1 < end - begin) {
            score.nll += NegativeLogLikelihood(logits, part[position + 1]);
            ++score.scored;
          }
          if (writer == nullptr || !written.ok()) return;
          const FlightRecorder::Outside outside(worker.control().recorder());  // it may be a pipe
          written = writer->Append(logits.data(), static_cast<int64_t>(logits.size_bytes()));
        }));
    RETURN_IF_ERROR(written);
  }
  if (writer != nullptr) RETURN_IF_ERROR(writer->Finish());
  return score;
}

}  // namespace

absl::Status RunEval(ControlPlane& control, const EvalFlags& flags) {
  if (flags.text_file.empty() == flags.ids_file.empty())
    return UsageError("eval: give either --text FILE or --ids FILE");
  if (flags.model.max_model_len == 1)
    return UsageError("--max-model-len 1: scoring a token takes the one before it");
  ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control, flags.model));
  absl::StatusOr<std::vector<TokenId>> tokens = std::vector<TokenId>();
  if (control.rank() == 0) {
    const FlightRecorder::Outside outside(control.recorder());  // the text may come out of a pipe
    tokens = ReadTokens(flags);
  }
  RETURN_IF_ERROR(control.Agree(tokens.status()));
  absl::StatusOr<std::unique_ptr<SafetensorsWriter>> writer = nullptr;
  if (control.rank() == 0)
    writer = OpenLogits(control, flags, static_cast<int64_t>(tokens->size()));
  RETURN_IF_ERROR(control.Agree(writer.status()));
  ByteWriter out;
  out.PutVector(*tokens);
  std::string bytes = out.Take();
  control.Broadcast(&bytes);
  ByteReader in(bytes);
  *tokens = in.GetVector<TokenId>();

  const Demand demand{.max_sequence_tokens = static_cast<int64_t>(tokens->size()),
                      .sequences = 1,
                      .logit_rows = kRowsAtOnce};
  ASSIGN_OR_RETURN(const std::unique_ptr<Worker> worker,
                   LoadWorker(control, topology, flags.model, demand));
  absl::StatusOr<Score> score = Score{};
  absl::Status status;
  if (control.rank() == 0) {
    score = ScoreTokens(*worker, *tokens, writer->get());
    status = score.status();
  } else if (control.rank() == worker->leader()) {
    StepPipeline idle(*worker);  // the other replicas have nothing to do
  } else {
    status = worker->Run();
  }
  RETURN_IF_ERROR(control.Agree(status));
  if (control.rank() != 0) return absl::OkStatus();
  const double mean = score->nll / static_cast<double>(score->scored);
  if (flags.json) {
    const nlohmann::ordered_json line{{"tokens", tokens->size()},
                                      {"scored", score->scored},
                                      {"nll", mean},
                                      {"perplexity", std::exp(mean)}};
    return WriteOut(control, line.dump() + "\n");
  }
  return WriteOut(control, absl::StrFormat("tokens %d  scored %d  nll %.6f  perplexity %.4f\n",
                                           tokens->size(), score->scored, mean, std::exp(mean)));
}

}  // namespace trireme
