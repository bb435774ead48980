// A double of CUDA's runtime library for tests of the device and the stream
// (kernels/cuda/device.cc, stream.cc) without a GPU: memory is the host's, nothing is launched, and
// a test says which GPUs there are, what calls answer, and whether copies are done at once or when
// something waits for them. One thread.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace trireme {

struct CudaRuntimeDouble {
  struct Gpu {
    std::string name = "double";
    int major = 9, minor = 0;
    size_t shared_bytes = 228 << 10;
  };
  std::vector<Gpu> gpus = {{}};
  int driver = CUDART_VERSION;
  // What the calls of these names answer.
  cudaError_t allocation = cudaSuccess;    // cudaMalloc
  cudaError_t copy = cudaSuccess;          // cudaMemcpyAsync
  cudaError_t synchronize = cudaSuccess;   // cudaStreamSynchronize
  cudaError_t graph_launch = cudaSuccess;  // cudaGraphLaunch
  bool copies_wait = false;  // those of cudaMemcpyAsync and its like, for a wait of any kind
  // How often they were called.
  int copies = 0, graph_launches = 0, waits_for_events = 0;
  // Memory by cudaHostAlloc, and copies that wait.
  std::vector<std::pair<const char*, size_t>> page_locked;
  std::vector<std::function<void()>> waiting;
};
CudaRuntimeDouble& TheCudaRuntimeDouble();

}  // namespace trireme
