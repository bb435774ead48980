#include "tests/host_cuda/cuda_runtime_double.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_codes.h"
#include "kernels/cuda/read_bandwidth.h"

namespace trireme {

CudaRuntimeDouble& TheCudaRuntimeDouble() {
  static CudaRuntimeDouble runtime;
  return runtime;
}

// Of the backend's kernels, which are not here.
namespace cuda {
const OpTable kOps{};
std::string WhyNoCode() { return ""; }
void PermuteColumns(gpu::StreamHandle, ConstTensorView, void*) {}
void SiluAndMul(Stream&, ConstTensorView, TensorView) {}
absl::StatusOr<int64_t> CodesRoom::Reserve(Device&, int64_t, int64_t) { return 0; }
}  // namespace cuda

namespace {
CudaRuntimeDouble& Cuda() { return TheCudaRuntimeDouble(); }
cudaError_t DoCopy(const std::function<void()>& copy) {
  ++Cuda().copies;
  if (Cuda().copy != cudaSuccess) return Cuda().copy;
  if (Cuda().copies_wait) {
    Cuda().waiting.push_back(copy);
  } else {
    copy();
  }
  return cudaSuccess;
}
void DoWaiting() {
  for (const auto& copy : std::exchange(Cuda().waiting, {})) copy();
}
}  // namespace
}  // namespace trireme

using trireme::Cuda;
using trireme::DoCopy;
using trireme::DoWaiting;

extern "C" {
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "another error";
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = Cuda().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(Cuda().gpus.size());
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const auto& gpu = Cuda().gpus.at(static_cast<size_t>(device));
  std::memset(properties, 0, sizeof(*properties));
  std::snprintf(properties->name, sizeof(properties->name), "%s", gpu.name.c_str());
  properties->major = gpu.major;
  properties->minor = gpu.minor;
  properties->sharedMemPerBlockOptin = gpu.shared_bytes;
  properties->pciBusID = device;
  properties->totalGlobalMem = size_t{1} << 30;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return Cuda().synchronize; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02x:00.0", device);
  return cudaSuccess;
}
// A process sees its own GPUs alone.
cudaError_t cudaDeviceGetByPCIBusId(int*, const char*) { return cudaErrorInvalidDevice; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void*) {
  std::memset(handle, 0, sizeof(*handle));
  return cudaSuccess;
}
// Memory of another process: an address that is not to be touched.
cudaError_t cudaIpcOpenMemHandle(void** data, cudaIpcMemHandle_t, unsigned) {
  static char elsewhere;
  *data = &elsewhere;
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (Cuda().allocation == cudaSuccess) *data = std::malloc(bytes);
  return Cuda().allocation;
}
cudaError_t cudaMallocManaged(void** data, size_t bytes, unsigned) {
  return cudaMalloc(data, bytes);
}
cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = size_t{1} << 29;
  *total = size_t{1} << 30;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return DoCopy([=] { std::memmove(dst, src, bytes); });
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind) {
  return cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_stride, const void* src, size_t src_stride,
                              size_t bytes, size_t rows, cudaMemcpyKind, cudaStream_t) {
  return DoCopy([=] {
    for (size_t row = 0; row < rows; ++row) {
      std::memmove(static_cast<char*>(dst) + row * dst_stride,
                   static_cast<const char*>(src) + row * src_stride, bytes);
    }
  });
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  const cudaError_t error = cudaMalloc(data, bytes);
  if (error == cudaSuccess) Cuda().page_locked.emplace_back(static_cast<char*>(*data), bytes);
  return error;
}
cudaError_t cudaFreeHost(void* data) {
  std::erase_if(Cuda().page_locked, [&](const auto& block) { return block.first == data; });
  return cudaFree(data);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  for (const auto& [begin, bytes] : Cuda().page_locked) {
    const char* const at = static_cast<const char*>(p);
    if (at >= begin && at < begin + bytes) attributes->type = cudaMemoryTypeHost;
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = static_cast<cudaEvent_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++Cuda().waits_for_events;
  DoWaiting();
  return cudaSuccess;
}

// No two streams alike: the error of one is not another's.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = static_cast<cudaStream_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::free(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  DoWaiting();
  return Cuda().synchronize;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return Cuda().synchronize; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventQuery(cudaEvent_t) { return Cuda().synchronize; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = static_cast<cudaGraph_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  *executable = static_cast<cudaGraphExec_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  std::free(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  std::free(executable);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  ++Cuda().graph_launches;
  return Cuda().graph_launch;
}
}
