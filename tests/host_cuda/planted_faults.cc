// Runs one wrong kernel by name; a sanitizer must end the run with a failure.
#include <cstdio>
#include <string>
#include <vector>

#include "tests/host_cuda/sample_kernels.cuh"

int main(int argc, char** argv) {
  using namespace host_cuda_samples;
  const std::string fault = argc > 1 ? argv[1] : "";
  std::vector<float> x(128, 1.0f);
  std::vector<int> n(256, 1);
  float out = 0.0f;
  if (fault == "read_after_write") {
    gpu::Launch({dim3(1), dim3(128), 128 * sizeof(float)}, TreeSum<false>, x.data(), &out);
  } else if (fault == "write_after_read") {
    gpu::Launch({dim3(1), dim3(256)}, Rotate<false>, n.data(), 3);
  } else if (fault == "out_of_bounds") {
    gpu::Launch({dim3(1), dim3(64)}, OutOfBounds, &out);
  } else {
    std::printf("usage: planted_faults read_after_write | write_after_read | out_of_bounds\n");
    return 2;
  }
  std::printf("%s was not noticed\n", fault.c_str());
  return 0;
}
