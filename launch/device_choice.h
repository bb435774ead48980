// What --device auto takes: the GPUs when each rank can have its own, so that all ranks compute
// alike, and else the CPU. A pure function; launch/session.cc asks the ranks.
#pragma once

#include <string>
#include <vector>

namespace trireme {

struct GpusOfRank {
  std::string host;
  std::vector<std::string> gpus{};  // DeviceSpec.identity of those it can use
  // Why it has none although its host has an NVIDIA driver; else empty.
  std::string why_none{};
};

struct DeviceChoice {
  std::string device;   // "cuda" or "cpu"
  std::string warning;  // the CPU beside GPUs: one line; else empty
};
DeviceChoice ChooseDevice(const std::vector<GpusOfRank>& ranks, bool allow_shared_gpu);

}  // namespace trireme
