// A double of CUDA's runtime library for tests of the device and the stream
// (kernels/cuda/device.cc, stream.cc) without a GPU: memory is the host's, copies are done at once,
// nothing is launched, and a test says which GPUs there are and what calls answer. One thread.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
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
  // How often they were called.
  int copies = 0, graph_launches = 0;
};
CudaRuntimeDouble& TheCudaRuntimeDouble();

}  // namespace trireme
