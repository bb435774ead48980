// A stream that records and replays as a CUDA stream does, without a device or ops: what is
// enqueued is a function, kept with the values that it holds.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "tests/parallel/host_device.h"

namespace trireme {

class RecordingStream final : public Stream {
 public:
  explicit RecordingStream(Device* device) : Stream(device, nullptr) {}

  void Enqueue(std::function<void()> op) {
    if (!capturing_) return op();
    nodes_.push_back(std::move(op));
  }
  void Copy(void* dst, const void* src, size_t bytes) override {
    Enqueue([=] {
      if (bytes > 0) std::memmove(dst, src, bytes);
    });
  }
  absl::Status Synchronize() override { return synchronize_status; }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(const std::function<void()>& work) override {
    capturing_ = true;
    work();
    capturing_ = false;
    std::vector<std::function<void()>> nodes = std::exchange(nodes_, {});
    if (!capture_status.ok()) return capture_status;
    return std::make_unique<Recorded>(std::move(nodes), &graphs_alive);
  }

  static constexpr int64_t kGraphBytes = 1000;
  absl::Status capture_status, synchronize_status;  // what to answer
  int graphs_alive = 0;

 private:
  class Recorded final : public Graph {
   public:
    Recorded(std::vector<std::function<void()>> nodes, int* alive)
        : Graph(kGraphBytes), nodes_(std::move(nodes)), alive_(alive) {
      ++*alive_;
    }
    ~Recorded() override { --*alive_; }
    void Replay(Stream&) override {
      for (const auto& node : nodes_) node();
    }

   private:
    std::vector<std::function<void()>> nodes_;
    int* alive_;
  };

  bool capturing_ = false;
  std::vector<std::function<void()>> nodes_;
};

}  // namespace trireme
