// trireme generate: prompts in, text out. Rank 0 reads and tokenises; the requests are dealt over
// the data-parallel replicas, each of which has its own engine on its first rank; every token goes
// to rank 0, which prints the answers, and tells a supervisor.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/journal.h"
#include "launch/output_files.h"
#include "launch/prompts.h"
#include "launch/session.h"
#include "launch/trace_file.h"
#include "nlohmann/json.hpp"
#include "parallel/failure_detector.h"
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
  int32_t sample = 0;
  std::string text;
  std::vector<SampledToken> tokens;
  FinishReason finish = FinishReason::kNone;
  std::string error{};               // why, with kError
  double first_token_seconds = 0.0;  // since the requests were submitted
  double total_seconds = 0.0;
  RequestTimes times{};  // in its engine, of the last attempt
};

std::string JsonLine(const PromptRequest& prompt, const Completion& done) {
  nlohmann::ordered_json out;
  out["index"] = done.id;
  if (prompt.request.n > 1) out["sample"] = done.sample;
  if (!prompt.text.empty()) out["prompt"] = prompt.text;
  out["prompt_tokens"] = prompt.request.prompt.size();
  out["text"] = done.text;
  out["token_ids"] = nlohmann::ordered_json::array();
  for (const SampledToken& sampled : done.tokens) out["token_ids"].push_back(sampled.token);
  out["finish_reason"] = Name(done.finish);
  if (!done.error.empty()) out["error"] = done.error;
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
                    {"total_ms", done.total_seconds * 1e3},
                    {"queue_ms", static_cast<double>(done.times.queue_us) * 1e-3},
                    {"prefill_ms", static_cast<double>(done.times.prefill_us) * 1e-3},
                    {"decode_ms", static_cast<double>(done.times.decode_us) * 1e-3},
                    {"communication_ms", static_cast<double>(done.times.communication_us) * 1e-3},
                    {"overhead_ms", static_cast<double>(done.times.overhead_us) * 1e-3}};
  return out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

class Generator {
 public:
  Generator(ControlPlane& control, const GenerateFlags& flags)
      : control_(control), flags_(flags), begin_(Clock::now()) {
    // A supervisor does not let requests fail before it gives up itself.
    if (control_.detector() != nullptr && control_.rank() == 0 && flags_.journal == nullptr)
      hook_ = control_.detector()->AddHook([this](const absl::Status& s) { FailRequests(s); });
  }
  ~Generator() {
    if (hook_ != 0) control_.detector()->RemoveHook(hook_);
  }

  absl::Status Run() {
    ASSIGN_OR_RETURN(options_, EngineOptionsOf(flags_.serving));
    ASSIGN_OR_RETURN(const Topology topology, AgreeOnTopology(control_, flags_.model));
    RETURN_IF_ERROR(control_.Agree(ReadRequests()));
    BroadcastRequests();
    ASSIGN_OR_RETURN(worker_, LoadWorker(control_, topology, flags_.model, DemandOf(topology)));
    RETURN_IF_ERROR(control_.Agree(LoadTokenizerOfLeader()));
    BeginTraceFile(flags_.serving.trace_file);
    const absl::Status status = control_.rank() == worker_->leader() ? Lead() : worker_->Run();
    RETURN_IF_ERROR(control_.Agree(status));
    RETURN_IF_ERROR(EndTraceFile(control_, flags_.serving.trace_file));
    SumStats();
    std::string rest = DescribeBytesPerRank(*worker_);
    if (const std::string sums = worker_->DescribeSums(); !sums.empty())
      absl::StrAppend(&rest, " | ", sums);
    if (control_.rank() == 0) std::fprintf(stderr, "%s | %s\n", Summary().c_str(), rest.c_str());
    return absl::OkStatus();
  }

 private:
  // Rank 0 needs the tokenizer for the prompts; a checkpoint without one takes token ids.
  absl::Status ReadRequests() {
    if (control_.rank() != 0) return absl::OkStatus();
    RETURN_IF_ERROR(CheckOutputFiles(
        {{"--metrics", flags_.serving.metrics_file}, {"--trace", flags_.serving.trace_file}},
        {{"--prompts", flags_.prompts_file}}, flags_.model.model_dir));
    RETURN_IF_ERROR(LoadTokenizer());
    if (flags_.history != nullptr && !flags_.history->requests.empty()) {
      GoOnFrom(*flags_.history);
      return absl::OkStatus();
    }
    const FlightRecorder::Outside outside(control_.recorder());  // a file may be a pipe
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags_.model.model_dir));
    ASSIGN_OR_RETURN(std::vector<PromptRequest> requests,
                     CollectRequests(flags_, config, tokenizer_.get()));
    SetRequests(std::move(requests));
    for (const PromptRequest& prompt : requests_) {
      if (flags_.journal != nullptr && prompt.request.n > 1)
        return UsageError("--max-restarts takes one answer a prompt; leave out --n");
    }
    return Note({.kind = JournalEntry::Kind::kStarted,
                 .id = requests_.size(),
                 .text = flags_.journal == nullptr ? "" : SerializeRequests(requests_)});
  }

  void BroadcastRequests() {
    ByteWriter out;
    out.Put(flags_.history == nullptr ? 0.0 : flags_.history->seconds);
    out.PutString(SerializeRequests(requests_));
    std::string bytes = out.Take();
    control_.Broadcast(&bytes);
    ByteReader in(bytes);
    seconds_before_ = in.Get<double>();
    SetRequests(ParseRequests(in.GetString()));
  }

  void SetRequests(std::vector<PromptRequest> requests) {
    const std::lock_guard lock(mutex_);
    requests_ = std::move(requests);
    if (flags_.history == nullptr || flags_.history->requests.empty())
      unfinished_ = static_cast<int64_t>(requests_.size());
  }

  // The requests of an attempt that failed, each with what it has produced.
  void GoOnFrom(const JobHistory& history) {
    requests_ = ParseRequests(history.requests);
    unfinished_ = static_cast<int64_t>(history.total - history.finished());
    for (const auto& [id, before] : history.by_id) {
      PromptRequest& prompt = requests_[id];
      prompt.done = before.finished;
      answers_ += before.finished;
      if (!before.error.empty() && failed_++ == 0) {
        first_error_ =
            absl::StrCat("prompt ", id + 1, " of ", requests_.size(), ": ", before.error);
      }
      if (before.finished || before.tokens.empty()) continue;
      for (const SampledToken& sampled : before.tokens)
        prompt.request.output.push_back(sampled.token);
      open_[{id, 0}] = {.id = id,
                        .text = before.text,
                        .tokens = before.tokens,
                        .first_token_seconds = before.first_token_seconds};
    }
  }

  // To standard output, or to the supervisor with the next entry.
  absl::Status Print(const std::string& text) {
    if (flags_.journal == nullptr) return WriteOut(control_, text);
    out_ += text;
    return absl::OkStatus();
  }
  absl::Status Note(JournalEntry entry) {
    if (flags_.journal == nullptr) return absl::OkStatus();
    entry.out = std::exchange(out_, "");
    const FlightRecorder::Outside outside(control_.recorder());
    return flags_.journal->Append(entry);
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
    // Of the replica that gets most.
    std::vector<int64_t> sequences(topology.dp_size);
    for (const PromptRequest& prompt : requests_)
      sequences[prompt.request.id % topology.dp_size] += prompt.request.n;
    demand.sequences = *std::max_element(sequences.begin(), sequences.end());
    return demand;
  }

  // Every leader runs its share; the others send rank 0 their tokens and then an empty message,
  // whatever has happened, so that nobody waits for an answer that will not come.
  absl::Status Lead() {
    ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                     Engine::Create(*worker_, tokenizer_.get(), options_));
    const Topology& topology = worker_->groups().topology;
    streaming_ = control_.rank() == 0 && requests_.size() == 1 && !flags_.json &&
                 requests_[0].request.n == 1;
    ended_.assign(topology.dp_size, false);
    ended_[0] = true;
    absl::Status status;
    if (streaming_ && flags_.echo && (flags_.history == nullptr || !flags_.history->output)) {
      status = Print(requests_[0].text);
      if (status.ok()) status = Note({.kind = JournalEntry::Kind::kOutput});
    }
    submitted_ = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                    std::chrono::duration<double>(seconds_before_));
    if (status.ok()) status = RunShare(*engine);
    stats_ = engine->Stats();
    if (status.ok() && control_.rank() == 0) status = WriteMetrics(flags_.serving, stats_);
    if (control_.rank() != 0) {
      control_.Send(0, kCompletionChannel, "");
      control_.FlushSends();
      return status;
    }
    // An error is not kept back until the others are done, where somebody ends them.
    if (!status.ok() && control_.detector() != nullptr) return status;
    for (int replica = 1; replica < topology.dp_size; ++replica) {
      const int leader = topology.RankOf(replica, 0, 0);
      while (!ended_[replica]) TakeMessage(replica, control_.Receive(leader, kCompletionChannel));
    }
    if (status.ok()) status = output_status_;
    if (status.ok() && failed_ > 0) {
      status = absl::DataLossError(
          absl::StrCat(failed_, " of ", answers_, " answers failed; the first: ", first_error_));
    }
    return status;
  }

  absl::Status RunShare(Engine& engine) {
    const int replica = worker_->groups().dp_index(), replicas = worker_->groups().topology.dp_size;
    for (const PromptRequest& prompt : requests_) {
      if (prompt.done || static_cast<int>(prompt.request.id % replicas) != replica) continue;
      const absl::Status submitted =
          engine.Submit(prompt.request, [this](const TokenOutput& output) { Take(output); });
      if (absl::IsAborted(submitted)) return submitted;
      if (!submitted.ok()) Refused(prompt.request, submitted);
    }
    engine.Close();
    constexpr std::chrono::milliseconds kPoll(5);  // for other replicas' answers
    while (!engine.WaitIdle(kPoll).ok()) {
      if (control_.rank() == 0) PollReplicas();
      // Nobody reads the answers any more; the engine cancels what is left when it goes.
      const std::lock_guard lock(mutex_);
      if (!output_status_.ok()) return absl::OkStatus();
    }
    return engine.Drain();
  }

  // An answer to this request, as an error on its way would be; the others go on.
  void Refused(const Request& request, const absl::Status& why) {
    for (int32_t sample = 0; sample < request.n; ++sample) {
      Take({.request_id = request.id,
            .sample = sample,
            .finish = FinishReason::kError,
            .status = why});
    }
  }

  // On the engine's delivery thread, or that of a refused Submit.
  void Take(const TokenOutput& output) {
    const bool failed = output.finish == FinishReason::kError;
    if (failed && absl::IsAborted(output.status)) return;  // not an answer: Drain gives the reason
    JournalEntry entry{.kind = JournalEntry::Kind::kToken,
                       .id = output.request_id,
                       .sample = output.sample,
                       .sampled = output.sampled,
                       .finish = output.finish,
                       .seconds = SecondsSince(submitted_),
                       .text = output.text,
                       .error = failed ? std::string(output.status.message()) : "",
                       .times = output.times};
    if (control_.rank() != 0) {
      control_.Send(0, kCompletionChannel, Serialize(entry));
      return;
    }
    const std::lock_guard lock(mutex_);
    Record(std::move(entry));
  }

  // On rank 0: a token, or an end, of any replica.
  void Record(JournalEntry entry) {
    const std::pair<uint64_t, int32_t> key(entry.id, entry.sample);
    Completion& open = open_[key];
    open.id = entry.id;
    open.sample = entry.sample;
    if (entry.sampled.token >= 0) {
      if (open.tokens.empty()) open.first_token_seconds = entry.seconds;
      open.tokens.push_back(entry.sampled);
    }
    open.text += entry.text;
    if (streaming_ && output_status_.ok()) output_status_ = Print(entry.text);
    if (entry.finish != FinishReason::kNone) {
      open.finish = entry.finish;
      open.error = entry.error;
      open.total_seconds = entry.seconds;
      open.times = entry.times;
      const auto node = open_.extract(key);
      Finished(node.mapped());
    }
    if (output_status_.ok()) output_status_ = Note(std::move(entry));
  }

  // On the failure detector's thread; this rank's own may be stuck anywhere. With --json every
  // request that was taken gets a line, answered or not.
  void FailRequests(const absl::Status& status) {
    std::unique_lock lock(mutex_, std::defer_lock);
    for (int tries = 0; tries < 300 && !lock.try_lock(); ++tries)  // ThreadSanitizer knows no
      std::this_thread::sleep_for(std::chrono::milliseconds(1));   // pthread_mutex_clocklock
    if (!lock.owns_lock() || unfinished_ == 0) return;
    if (streaming_) std::fputc('\n', stdout);
    std::fprintf(stderr, "  requests: %lld of %lld did not finish\n",
                 static_cast<long long>(unfinished_), static_cast<long long>(requests_.size()));
    for (const PromptRequest& prompt : requests_) {
      const auto answered = answered_.find(prompt.request.id);
      if (!flags_.json || (answered != answered_.end() && answered->second == prompt.request.n))
        continue;
      const auto open = open_.find({prompt.request.id, 0});
      nlohmann::ordered_json out{{"index", prompt.request.id},
                                 {"text", open == open_.end() ? "" : open->second.text},
                                 {"finish_reason", "error"},
                                 {"error", std::string(status.message())}};
      std::fprintf(stdout, "%s\n",
                   out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    }
    std::fflush(stdout);
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
    const std::lock_guard lock(mutex_);
    if (bytes.empty()) {
      ended_[replica] = true;
    } else {
      Record(ParseEntry(bytes));
    }
  }

  void Finished(const Completion& done) {
    if (++answered_[done.id] == requests_[done.id].request.n) --unfinished_;
    if (!done.tokens.empty()) first_token_seconds_.push_back(done.first_token_seconds);
    ++answers_;
    if (done.finish == FinishReason::kError) Failed(done);
    if (!output_status_.ok()) return;
    const PromptRequest& prompt = requests_[done.id];
    if (flags_.json) {
      output_status_ = Print(JsonLine(prompt, done));
    } else if (streaming_) {
      output_status_ = Print(tokenizer_ == nullptr ? Ids(done) + "\n" : "\n");
    } else {
      const std::string name = prompt.text.empty()
                                   ? absl::StrCat(prompt.request.prompt.size(), " token ids")
                                   : prompt.text;
      std::string answer =
          tokenizer_ == nullptr ? Ids(done) : (flags_.echo ? prompt.text : "") + done.text;
      output_status_ =
          Print(absl::StrCat("--- ", done.id + 1, "/", requests_.size(),
                             prompt.request.n > 1 ? absl::StrCat(" answer ", done.sample + 1) : "",
                             ": ", name, "\n", answer, "\n"));
    }
  }

  // A line a prompt; with a single one the last line of the job says it all.
  void Failed(const Completion& done) {
    const std::string line =
        absl::StrCat("prompt ", done.id + 1, " of ", requests_.size(), ": ", done.error);
    if (failed_++ == 0) first_error_ = line;
    if (failed_prompts_.insert(done.id).second && requests_.size() > 1)
      std::fprintf(stderr, "  %s\n", line.c_str());
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
  EngineOptions options_;
  const Clock::time_point begin_;
  Clock::time_point submitted_;
  double seconds_before_ = 0.0;  // since the requests were submitted, in attempts that failed
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<PromptRequest> requests_;
  std::unique_ptr<Worker> worker_;
  bool streaming_ = false;
  // Of what follows: answers come on the delivery thread and from replicas, and the failure
  // detector's thread looks when all is lost.
  std::mutex mutex_;
  absl::Status output_status_;
  std::string out_;  // for the supervisor to print
  int hook_ = 0;
  std::map<uint64_t, int32_t> answered_;  // samples of each request
  int64_t answers_ = 0, failed_ = 0;      // and why the first of them failed
  std::string first_error_;
  std::set<uint64_t> failed_prompts_;
  int64_t unfinished_ = 0;  // requests, on rank 0, of all replicas
  std::map<std::pair<uint64_t, int32_t>, Completion> open_;
  std::vector<bool> ended_;  // by replica: nothing more will come from it
  std::vector<double> first_token_seconds_;
  EngineStats stats_;
};

}  // namespace

absl::Status RunGenerate(ControlPlane& control, const GenerateFlags& flags) {
  if (flags.prompts.empty() && flags.prompts_file.empty() && flags.prompt_ids.empty()) {
    return UsageError("generate: give --prompt TEXT, --prompts FILE or --prompt-ids 1,5,9");
  }
  // What prompts inherit, by the name it was given; of a line of a file CollectRequests speaks.
  if (const absl::Status status = CheckSamplingParams(flags.sampling); !status.ok())
    return UsageError(absl::StrCat("--", status.message()));
  if (std::find(flags.stop.begin(), flags.stop.end(), "") != flags.stop.end())
    return UsageError("--stop: a stop string is empty; leave it out instead");
  if (flags.sampling.logprobs >= 0 && !flags.json)
    return UsageError("--logprobs: they are part of the --json output; add --json");
  if (flags.echo && (flags.json || !flags.prompt_ids.empty()))
    return UsageError("--echo prints text prompts before text answers; leave it out here");
  return Generator(control, flags).Run();
}

}  // namespace trireme
