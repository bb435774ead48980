// A double of libcublasLt for tests without a GPU (cublas_lt_double.cc, a library of its own):
// the functions that kernels/cuda loads, computing on the host, and strict about what they are
// given: it aborts where the real library could read or write what it must not. Work of a stream
// that captures goes into its recording, with the descriptors' values of that moment.
#pragma once

namespace trireme {

// Shared by all handles of the process. Not for several threads at once.
struct CublasLtDouble {
  const char* failing = nullptr;  // the function that gives `status`, e.g. "cublasLtMatmul"
  int status = 0;                 // a cublasStatus_t
  bool no_algorithm = false;      // for any shape
  int searches = 0, matmuls = 0;  // calls so far
  int alive = 0;                  // handles, descriptors, layouts and preferences
};
// That of the library which NewHostCudaDeviceWithCublasLt opens.
CublasLtDouble& TheCublasLtDouble();

}  // namespace trireme
