// What a server does, with standard input in place of a network: requests come one a line while
// others are being answered, answers go out as they end. No thread waits for a model.
//   mpirun -n 4 build/cpu/bin/example_queue_server MODEL_DIR < requests.txt
// Lines: "ask ID MAX_TOKENS PROMPT...", "cancel ID", "metrics".
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

#include "runtime/engine.h"

namespace trireme {
namespace {

class QueueServer {
 public:
  QueueServer(Worker& worker, const Tokenizer& tokenizer)
      : worker_(worker), tokenizer_(tokenizer) {}

  absl::Status Serve(std::istream& in) {
    // Who comes when 64 more are waiting is told so at once, and asks another server.
    auto engine = Engine::Create(worker_, &tokenizer_, {.max_queue = 64});
    if (!engine.ok()) return engine.status();
    engine_ = *std::move(engine);
    for (std::string line; std::getline(in, line);) {
      std::istringstream words(line);
      std::string verb;
      uint64_t id = 0;
      words >> verb;
      absl::Status status;
      if (verb == "metrics") {
        Say(PrometheusText(engine_->Stats()));
      } else if (verb == "cancel" && words >> id) {
        status = engine_->Cancel(id);
      } else if (verb == "ask" && words >> id) {
        status = Ask(id, words);
      } else {
        status = absl::InvalidArgumentError("ask ID MAX_TOKENS PROMPT, cancel ID, or metrics");
      }
      if (!status.ok()) Say("refused " + std::to_string(id) + ": " + status.ToString() + "\n");
    }
    return engine_->Drain();
  }

 private:
  absl::Status Ask(uint64_t id, std::istringstream& words) {
    Request request;
    request.id = id;
    words >> request.max_tokens >> std::ws;
    std::string prompt;
    std::getline(words, prompt);
    auto tokens = tokenizer_.Encode(prompt);
    if (!tokens.ok()) return tokens.status();
    request.prompt = *std::move(tokens);
    request.deadline_us = engine_->NowMicros() + 60'000'000;
    for (const int64_t eos : worker_.config().eos_token_ids)
      request.stop_tokens.push_back(static_cast<TokenId>(eos));
    return engine_->Submit(std::move(request), [this](const TokenOutput& output) { Take(output); });
  }

  // On the engine's delivery thread: quick, and no waiting.
  void Take(const TokenOutput& output) {
    std::string& text = texts_[output.request_id];
    text += output.text;
    if (output.finish == FinishReason::kNone) return;
    Say("answer " + std::to_string(output.request_id) + " (" + Name(output.finish) + "): " + text +
        "\n");
    texts_.erase(output.request_id);
  }

  void Say(const std::string& text) {
    const std::lock_guard lock(output_);
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  }

  Worker& worker_;
  const Tokenizer& tokenizer_;
  std::mutex output_;
  std::map<uint64_t, std::string> texts_;  // the delivery thread's
  std::unique_ptr<Engine> engine_;         // ends first: its callbacks use what is above
};

int Main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s MODEL_DIR\n", argv[0]), 2;
  auto control = ControlPlane::Start(&argc, &argv);
  if (!control.ok()) return 1;
  const Topology topology{.tp_size = 1, .pp_size = (*control)->size(), .dp_size = 1};
  auto worker = Worker::Load(**control, topology, argv[1], {.max_num_seqs = 16});
  auto tokenizer = Tokenizer::Load(argv[1]);
  const absl::Status loaded = worker.ok() ? tokenizer.status() : worker.status();
  if (!loaded.ok()) {
    if ((*control)->rank() == 0) std::fprintf(stderr, "%s\n", loaded.ToString().c_str());
    return 1;
  }
  if ((*control)->rank() != (*worker)->leader()) return (*worker)->Run().ok() ? 0 : 1;
  const absl::Status served = QueueServer(**worker, **tokenizer).Serve(std::cin);
  if (!served.ok()) std::fprintf(stderr, "%s\n", served.ToString().c_str());
  return served.ok() ? 0 : 1;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
