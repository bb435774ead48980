// trireme generate: prompts in, text out. Rank 0 reads and tokenises; the requests are dealt over
// the data-parallel replicas, each of which has its own engine on its first rank; finished answers
// go to rank 0, which prints them.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/prompts.h"
#include "launch/session.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// A finished answer.
struct Completion {
  uint64_t id = 0;
  std::string text;
  std::vector<SampledToken> tokens;
  FinishReason finish = FinishReason::kNone;
  double first_token_seconds = 0.0;  // since the requests were submitted
  double total_seconds = 0.0;
};

std::string Serialize(const Completion& completion) {
  ByteWriter out;
  out.Put(completion.id);
  out.PutString(completion.text);
  out.PutString(Serialize(StepResult{.step = 0, .sampled = completion.tokens, .logits = {}}));
  out.Put(completion.finish);
  out.Put(completion.first_token_seconds);
  out.Put(completion.total_seconds);
  return out.Take();
}

Completion ParseCompletion(const std::string& bytes) {
  ByteReader in(bytes);
  Completion completion;
  completion.id = in.Get<uint64_t>();
  completion.text = in.GetString();
  completion.tokens = ParseStepResult(in.GetString()).sampled;
  completion.finish = in.Get<FinishReason>();
  completion.first_token_seconds = in.Get<double>();
  completion.total_seconds = in.Get<double>();
  return completion;
}

std::string JsonLine(const PromptRequest& prompt, const Completion& done) {
  nlohmann::ordered_json out;
  out["index"] = done.id;
  if (!prompt.text.empty()) out["prompt"] = prompt.text;
  out["prompt_tokens"] = prompt.request.prompt.size();
  out["text"] = done.text;
  out["token_ids"] = nlohmann::ordered_json::array();
  for (const SampledToken& sampled : done.tokens) out["token_ids"].push_back(sampled.token);
  out["finish_reason"] = Name(done.finish);
  if (prompt.request.sampling.logprobs >= 0) {
    out["logprobs"] = nlohmann::ordered_json::array();
    for (const SampledToken& sampled : done.tokens) {
      nlohmann::ordered_json entry{{"id", sampled.token}, {"logprob", sampled.logprob}};
      entry["top"] = nlohmann::ordered_json::array();
      for (const auto& [id, logprob] : sampled.top)
        entry["top"].push_back({{"id", id}, {"logprob", logprob}});
      out["logprobs"].push_back(std::move(entry));
    }
  }
  out["timings"] = {{"first_token_ms", done.first_token_seconds * 1e3},
                    {"total_ms", done.total_seconds * 1e3}};
  return out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

class Generator {
 public:
  Generator(ControlPlane& control, const GenerateFlags& flags)
      : control_(control), flags_(flags), begin_(Clock::now()) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control_, flags_.model));
    RETURN_IF_ERROR(control_.Agree(ReadRequests()));
    std::string bytes = control_.rank() == 0 ? SerializeRequests(requests_) : "";
    control_.Broadcast(&bytes);
    requests_ = ParseRequests(bytes);
    ASSIGN_OR_RETURN(worker_, LoadWorker(control_, topology, flags_.model, DemandOf(topology)));
    RETURN_IF_ERROR(control_.Agree(LoadTokenizerOfLeader()));
    const absl::Status status = control_.rank() == worker_->leader() ? Lead() : worker_->Run();
    RETURN_IF_ERROR(control_.Agree(status));
    SumStats();
    const std::string memory = DescribeBytesPerRank(*worker_);
    if (control_.rank() == 0) std::fprintf(stderr, "%s | %s\n", Summary().c_str(), memory.c_str());
    return absl::OkStatus();
  }

 private:
  // Rank 0 needs the tokenizer for the prompts; a checkpoint without one takes token ids.
  absl::Status ReadRequests() {
    if (control_.rank() != 0) return absl::OkStatus();
    RETURN_IF_ERROR(LoadTokenizer());
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags_.model.model_dir));
    ASSIGN_OR_RETURN(requests_, CollectRequests(flags_, config, tokenizer_.get()));
    return absl::OkStatus();
  }

  absl::Status LoadTokenizer() {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(flags_.model.model_dir);
    if (!tokenizer.ok() && !absl::IsNotFound(tokenizer.status())) return tokenizer.status();
    if (tokenizer.ok()) tokenizer_ = *std::move(tokenizer);
    return absl::OkStatus();
  }
  absl::Status LoadTokenizerOfLeader() {
    return control_.rank() == worker_->leader() && tokenizer_ == nullptr ? LoadTokenizer()
                                                                         : absl::OkStatus();
  }

  Demand DemandOf(const Topology& topology) const {
    Demand demand;
    for (const PromptRequest& prompt : requests_) {
      const int64_t tokens =
          static_cast<int64_t>(prompt.request.prompt.size()) + prompt.request.max_tokens;
      demand.max_sequence_tokens = std::max(demand.max_sequence_tokens, tokens);
    }
    demand.sequences =
        (static_cast<int64_t>(requests_.size()) + topology.dp_size - 1) / topology.dp_size;
    return demand;
  }

  // Every leader runs its share; the others send rank 0 their answers and then an empty message,
  // whatever has happened, so that nobody waits for an answer that will not come.
  absl::Status Lead() {
    Engine engine(*worker_, tokenizer_.get());
    const Topology& topology = worker_->groups().topology;
    streaming_ = control_.rank() == 0 && requests_.size() == 1 && !flags_.json;
    ended_.assign(topology.dp_size, false);
    ended_[0] = true;
    absl::Status status;
    if (streaming_ && flags_.echo) status = WriteOut(requests_[0].text);
    submitted_ = Clock::now();
    if (status.ok()) status = RunShare(engine);
    stats_ = engine.stats();
    if (control_.rank() != 0) {
      control_.Send(0, kCompletionChannel, "");
      control_.FlushSends();
      return status;
    }
    for (int replica = 1; replica < topology.dp_size; ++replica) {
      const int leader = topology.RankOf(replica, 0, 0);
      while (!ended_[replica]) TakeMessage(replica, control_.Receive(leader, kCompletionChannel));
    }
    return status.ok() ? output_status_ : status;
  }

  absl::Status RunShare(Engine& engine) {
    const int replica = worker_->groups().dp_index(), replicas = worker_->groups().topology.dp_size;
    for (const PromptRequest& prompt : requests_) {
      if (static_cast<int>(prompt.request.id % replicas) != replica) continue;
      RETURN_IF_ERROR(
          engine.Submit(prompt.request, [this](const TokenOutput& output) { Take(output); }));
    }
    while (output_status_.ok()) {
      ASSIGN_OR_RETURN(const bool more, engine.Step());
      if (!more) break;
      if (control_.rank() == 0) PollReplicas();
    }
    return absl::OkStatus();
  }

  void Take(const TokenOutput& output) {
    Completion& open = open_[output.request_id];
    open.id = output.request_id;
    if (open.tokens.empty()) open.first_token_seconds = SecondsSince(submitted_);
    open.tokens.push_back(output.sampled);
    open.text += output.text;
    if (streaming_ && output_status_.ok()) output_status_ = WriteOut(output.text);
    if (output.finish == FinishReason::kNone) return;
    open.finish = output.finish;
    open.total_seconds = SecondsSince(submitted_);
    const auto node = open_.extract(output.request_id);
    if (control_.rank() == 0) {
      Finished(node.mapped());
    } else {
      control_.Send(0, kCompletionChannel, Serialize(node.mapped()));
    }
  }

  void PollReplicas() {
    const Topology& topology = worker_->groups().topology;
    for (int replica = 1; replica < topology.dp_size; ++replica) {
      const int leader = topology.RankOf(replica, 0, 0);
      while (!ended_[replica]) {
        std::optional<std::string> bytes = control_.TryReceive(leader, kCompletionChannel);
        if (!bytes) break;
        TakeMessage(replica, *bytes);
      }
    }
  }
  void TakeMessage(int replica, const std::string& bytes) {
    if (bytes.empty()) {
      ended_[replica] = true;
    } else {
      Finished(ParseCompletion(bytes));
    }
  }

  void Finished(const Completion& done) {
    first_token_seconds_.push_back(done.first_token_seconds);
    if (!output_status_.ok()) return;
    const PromptRequest& prompt = requests_[done.id];
    if (flags_.json) {
      output_status_ = WriteOut(JsonLine(prompt, done));
    } else if (streaming_) {
      output_status_ = WriteOut(tokenizer_ == nullptr ? Ids(done) + "\n" : "\n");
    } else {
      const std::string name = prompt.text.empty()
                                   ? absl::StrCat(prompt.request.prompt.size(), " token ids")
                                   : prompt.text;
      std::string answer =
          tokenizer_ == nullptr ? Ids(done) : (flags_.echo ? prompt.text : "") + done.text;
      output_status_ = WriteOut(
          absl::StrCat("--- ", done.id + 1, "/", requests_.size(), ": ", name, "\n", answer, "\n"));
    }
  }

  static std::string Ids(const Completion& done) {
    std::string out;
    for (const SampledToken& sampled : done.tokens)
      absl::StrAppend(&out, out.empty() ? "" : ",", sampled.token);
    return out;
  }

  // Replicas work side by side: tokens add up, and the slowest one's time counts.
  void SumStats() {
    ByteWriter out;
    out.Put(stats_);
    EngineStats sum;
    for (const std::string& bytes : control_.AllGather(out.Take())) {
      const EngineStats one = ByteReader(bytes).Get<EngineStats>();
      sum.prefill_tokens += one.prefill_tokens;
      sum.decode_tokens += one.decode_tokens;
      sum.prefill_seconds = std::max(sum.prefill_seconds, one.prefill_seconds);
      sum.decode_seconds = std::max(sum.decode_seconds, one.decode_seconds);
    }
    stats_ = sum;
  }

  std::string Summary() const {
    std::vector<double> first = first_token_seconds_;
    std::sort(first.begin(), first.end());
    const auto rate = [](int64_t tokens, double seconds) {
      return seconds > 0.0 ? tokens / seconds : 0.0;
    };
    return absl::StrFormat(
        "prefill %d tokens, %.1f tok/s | decode %d tokens, %.1f tok/s | first token %.1f ms | "
        "total %.2f s",
        stats_.prefill_tokens, rate(stats_.prefill_tokens, stats_.prefill_seconds),
        stats_.decode_tokens, rate(stats_.decode_tokens, stats_.decode_seconds),
        first.empty() ? 0.0 : 1e3 * first[first.size() / 2], SecondsSince(begin_));
  }

  ControlPlane& control_;
  const GenerateFlags& flags_;
  const Clock::time_point begin_;
  Clock::time_point submitted_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<PromptRequest> requests_;
  std::unique_ptr<Worker> worker_;
  bool streaming_ = false;
  absl::Status output_status_;
  std::map<uint64_t, Completion> open_;
  std::vector<bool> ended_;  // by replica: nothing more will come from it
  std::vector<double> first_token_seconds_;
  EngineStats stats_;
};

}  // namespace

absl::Status RunGenerate(ControlPlane& control, const GenerateFlags& flags) {
  if (flags.prompts.empty() && flags.prompts_file.empty() && flags.prompt_ids.empty()) {
    return UsageError("generate: give --prompt TEXT, --prompts FILE or --prompt-ids 1,5,9");
  }
  if (flags.sampling.logprobs >= 0 && !flags.json)
    return UsageError("--logprobs: they are part of the --json output; add --json");
  if (flags.echo && (flags.json || !flags.prompt_ids.empty()))
    return UsageError("--echo prints text prompts before text answers; leave it out here");
  return Generator(control, flags).Run();
}

}  // namespace trireme
