// What a GraphCache counts, as plain data.
#pragma once

#include <array>
#include <cstdint>

namespace trireme {

// Why work ran eagerly.
enum class EagerReason : uint8_t {
  kPrompt,         // a step with a prompt's tokens, which is captured nowhere
  kOff,            // graphs were not asked for (--no-graphs)
  kDevice,         // the device does its work at once
  kCommunicator,   // the ranks exchange tensors through host memory within this work
  kCaptureFailed,  // of this size
  kNotEqual,       // of this size: a replay gave other bits
  kNotCaptured,    // nobody tried
};
inline constexpr int kEagerReasons = 7;
const char* Name(EagerReason reason);

struct GraphStats {
  int64_t graphs = 0;                            // captured and found equal
  int64_t bytes = 0;                             // of device memory that they hold
  int64_t replays = 0;                           // runs of work by replay, and
  std::array<int64_t, kEagerReasons> eager{};    // eagerly, by EagerReason
  std::array<int64_t, kEagerReasons> refused{};  // captures that are not used, likewise

  int64_t& eager_runs(EagerReason reason) { return eager[static_cast<size_t>(reason)]; }
  int64_t eager_runs(EagerReason reason) const { return eager[static_cast<size_t>(reason)]; }
  GraphStats& operator+=(const GraphStats& other) {
    graphs += other.graphs;
    bytes += other.bytes;
    replays += other.replays;
    for (int i = 0; i < kEagerReasons; ++i) {
      eager[i] += other.eager[i];
      refused[i] += other.refused[i];
    }
    return *this;
  }
  int64_t refusals(EagerReason reason) const { return refused[static_cast<size_t>(reason)]; }
};

}  // namespace trireme
