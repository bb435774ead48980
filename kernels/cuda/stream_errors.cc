#include "kernels/cuda/stream_errors.h"

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "kernels/check.h"

namespace gpu {
namespace {

struct Kept {
  std::atomic<int> count = 0;  // so that launches take no lock while all is well
  std::mutex mutex;
  std::unordered_map<cudaStream_t, cudaError_t> errors;
};

// Never destroyed: streams of static devices end late.
Kept& All() {
  static Kept* const all = new Kept;
  return *all;
}

bool IsOurFault(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorMissingConfiguration:
    case cudaErrorInvalidSymbol:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorNotPermitted:
    case cudaErrorNotSupported:
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureWrongThread:
      return true;
    default:
      return false;
  }
}

}  // namespace

cudaError_t KeptError(cudaStream_t stream) {
  Kept& all = All();
  if (all.count.load(std::memory_order_relaxed) == 0) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto it = all.errors.find(stream);
  return it == all.errors.end() ? cudaSuccess : it->second;
}

bool MayEnqueue(cudaStream_t stream) { return KeptError(stream) == cudaSuccess; }

void KeepError(cudaStream_t stream, cudaError_t error) {
  if (error == cudaSuccess) return;
  Kept& all = All();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.errors.emplace(stream, error).second) ++all.count;
}

cudaError_t TakeError(cudaStream_t stream) {
  Kept& all = All();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto it = all.errors.find(stream);
  if (it == all.errors.end()) return cudaSuccess;
  const cudaError_t error = it->second;
  all.errors.erase(it);
  --all.count;
  return error;
}

void CheckLaunch(cudaStream_t stream, cudaError_t error) {
  CHECK(!IsOurFault(error)) << "kernel launch: error " << static_cast<int>(error) << " of CUDA";
  if (error != cudaErrorStreamCaptureInvalidated) KeepError(stream, error);
}

}  // namespace gpu
