// Hands outputs to the callers' callbacks on a thread of its own, in order, so that a callback that
// blocks delays other callbacks but never a step. A callback that throws is not called again; what
// it threw is reported.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "runtime/metrics.h"
#include "runtime/request.h"

namespace trireme {

// What a request's caller gets for every token of every sample.
struct TokenOutput {
  uint64_t request_id = 0;
  int32_t sample = 0;
  SampledToken sampled{};  // token -1: an end without a token
  std::string text{};      // text that became final with this token; may be empty
  FinishReason finish = FinishReason::kNone;  // of the sample
  // Why, with kError. DataLoss: this request's logits were no numbers; the others go on. Aborted:
  // the engine has failed, and Drain says the same.
  absl::Status status{};
  // Of the request, until this sample's end; with a sample's last output only.
  RequestTimes times{};
};

class Delivery {
 public:
  using Callback = std::function<void(const TokenOutput&)>;
  struct Recipient {
    Callback callback;
    bool failed = false;  // threw; the delivery thread's
  };
  struct Item {
    std::shared_ptr<Recipient> recipient;
    TokenOutput output;
    bool last = false;  // of the request
  };
  // Both run on the delivery thread: what a callback threw, and that a request is over.
  struct Hooks {
    std::function<void(uint64_t request_id, const std::string& what)> threw;
    std::function<void(uint64_t request_id)> over;
  };

  explicit Delivery(Hooks hooks);
  ~Delivery();  // delivers what is queued first

  // Any thread; takes the items and leaves the vector empty.
  void Push(std::vector<Item>* items);
  bool OnThisThread() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  void Run();
  void Deliver(Item& item);

  const Hooks hooks_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Item> queue_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace trireme
