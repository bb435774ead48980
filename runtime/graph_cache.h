// Work of a stream that is captured once and replayed ever after (kernels/device.h, Graph): a
// hundred launches for the price of one. What differs between two runs of one key lies in device
// memory that the captured work reads; addresses, sizes and launch geometry are the key's own.
//
// Nothing is replayed on trust. Capture runs the work both ways on two sets of inputs, and where a
// replay's outputs are not the eager ones bit for bit, or the work cannot be captured, the key
// stays eager: counted, and kept to be said once. Used by one thread at a time. Must go before the
// communicators and the memory that its graphs hold the addresses of.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "parallel/control_plane.h"
#include "runtime/graph_stats.h"

namespace trireme {

// Users of a cache tell their work apart by its name, a literal of their own.
struct GraphKey {
  std::string_view work;
  int64_t size = 0;     // what the work is padded to: sequences, queries
  int64_t variant = 0;  // which of the buffers that take turns
  bool operator==(const GraphKey&) const = default;
  template <typename H>
  friend H AbslHashValue(H h, const GraphKey& key) {
    h = H::combine_contiguous(std::move(h), key.work.data(), key.work.size());
    return H::combine(std::move(h), key.size, key.variant);
  }
};
std::string Describe(const GraphKey& key);  // "decode of 8"

// Work to capture, and how to try it.
struct GraphTrial {
  // Enqueues the inputs of a round, 0 or 1, which the work may overwrite. The two differ in all
  // that may differ between runs, and what the work writes besides `outputs` it writes to the same
  // places in both.
  std::function<void(int round)> fill;
  // Enqueues the work on the inputs that fill has left.
  std::function<void()> work;
  std::vector<ConstTensorView> outputs;  // contiguous, on the device
};

class GraphCache {
 public:
  struct Options {
    // Why nothing is to be captured here; empty: it is.
    std::optional<EagerReason> never{};
    // Whether it holds on all ranks that take part in the captured work, which all capture the same
    // keys in the same order and must come to the same end. Empty: there is this rank alone.
    std::function<bool(bool here)> all_ranks{};
  };

  GraphCache() : GraphCache(Options{.never = EagerReason::kNotCaptured}) {}
  explicit GraphCache(Options options) : options_(std::move(options)) {}

  // kDevice where this stream runs its work at once; else empty.
  static std::optional<EagerReason> WhyNever(Stream& stream);

  // Start-up only: waits, allocates, and runs the trial's work three times eagerly and once by
  // replay. True when runs of the key will be replayed. REQUIRES: the key is new.
  bool Capture(Stream& stream, const GraphKey& key, const GraphTrial& trial);
  bool Holds(const GraphKey& key) const;

  // Replays what was captured under the key, or calls `work`. Allocates nothing.
  void Run(Stream& stream, const GraphKey& key, absl::FunctionRef<void()> work);
  // Of work that has no key.
  void RunEagerly(EagerReason reason, absl::FunctionRef<void()> work);

  const GraphStats& stats() const { return stats_; }
  // Of the first key that stays eager by this rank's doing, a line for people; OK: there is none.
  // One that lacked memory (ResourceExhausted) comes before all others.
  const absl::Status& refusal() const { return refusal_; }

 private:
  struct Entry {
    std::unique_ptr<Graph> graph;  // null: the key stays eager, for this reason
    EagerReason reason = EagerReason::kNotCaptured;
  };
  bool OnAllRanks(bool here) const { return options_.all_ranks ? options_.all_ranks(here) : here; }
  // `why`: OK where it is another rank's.
  bool Refuse(const GraphKey& key, EagerReason reason, const absl::Status& why);

  Options options_;
  GraphStats stats_;
  absl::Status refusal_;
  absl::flat_hash_map<GraphKey, Entry> entries_;
};

// Collective over the ranks of `control` (null: this one alone), after they have captured. `warn`
// of each, where it is not empty, gets the lowest rank's line of those that have one.
void TellRefusal(ControlPlane* control, const absl::Status& refusal,
                 const std::function<void(const std::string& line)>& warn);

}  // namespace trireme
