#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/stream_errors.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

class CudaGraph final : public Graph {
 public:
  CudaGraph(cudaGraphExec_t executable, int64_t bytes) : Graph(bytes), executable_(executable) {}
  ~CudaGraph() override { cudaGraphExecDestroy(executable_); }
  void Replay(Stream& stream) override {
    const cudaStream_t handle = static_cast<CudaStream&>(stream).handle();
    if (gpu::MayEnqueue(handle)) gpu::CheckLaunch(handle, cudaGraphLaunch(executable_, handle));
  }

 private:
  cudaGraphExec_t executable_;
};

// No call of this process reaches the GPU again.
bool IsOfLostGpu(cudaError_t error) {
  switch (error) {
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoDevice:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

int64_t FreeBytes() {
  size_t free_bytes = 0, total = 0;
  cudaMemGetInfo(&free_bytes, &total);
  return static_cast<int64_t>(free_bytes);
}

}  // namespace

absl::Status StatusOf(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string words = absl::StrCat(what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) {
    return absl::ResourceExhaustedError(
        absl::StrCat(words, ": lower --kv-cache-memory, --max-num-seqs or --max-model-len"));
  }
  if (!IsOfLostGpu(error)) return absl::InternalError(words);
  return absl::InternalError(absl::StrCat(
      words, ": the GPU was lost or a kernel failed: dmesg shows its Xid; start again"));
}

gpu::StreamHandle NativeHandle(Stream& stream) { return static_cast<CudaStream&>(stream).handle(); }
MatMulLibrary* LibraryOf(Stream& stream) {
  return static_cast<CudaStream&>(stream).matmul_library();
}
CodesRoom& CodesRoomOf(Stream& stream) { return static_cast<CudaStream&>(stream).codes_room(); }
MatMulRoom& PartsRoomOf(Stream& stream) { return static_cast<CudaStream&>(stream).parts_room(); }

CudaStream::CudaStream(Device* device, int device_index, bool waits_for_copies, cudaStream_t handle,
                       const CublasLt* cublas)
    : Stream(device, &kOps),
      device_index_(device_index),
      waits_for_copies_(waits_for_copies),
      handle_(handle),
      library_(cublas != nullptr ? std::make_unique<MatMulLibrary>(*cublas) : nullptr) {}

CudaStream::~CudaStream() {
  gpu::TakeError(handle_);
  cudaStreamDestroy(handle_);
}

cudaStream_t CudaStream::handle() const {
  // A process has one GPU, so a thread that has been here needs nothing more.
  thread_local int current = -1;
  if (current != device_index_) {
    const cudaError_t error = cudaSetDevice(device_index_);
    gpu::KeepError(handle_, error);
    if (error == cudaSuccess) current = device_index_;
  }
  return handle_;
}

void CudaStream::Copy(void* dst, const void* src, size_t bytes) {
  if (bytes == 0) return;
  const cudaStream_t stream = handle();
  if (!gpu::MayEnqueue(stream)) return;
  EndCopy(UsesRing(src, bytes, 1) ? uploads_.Copy(dst, bytes, src, bytes, bytes, 1, stream)
                                  : cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream));
}

void CudaStream::CopyRows(void* dst, size_t dst_stride, const void* src, size_t src_stride,
                          size_t bytes, size_t rows) {
  if (bytes == 0 || rows == 0) return;
  const cudaStream_t stream = handle();
  if (!gpu::MayEnqueue(stream)) return;
  EndCopy(UsesRing(src, bytes, rows)
              ? uploads_.Copy(dst, dst_stride, src, src_stride, bytes, rows, stream)
              : cudaMemcpy2DAsync(dst, dst_stride, src, src_stride, bytes, rows, cudaMemcpyDefault,
                                  stream));
}

// A graph's copies read the memory they were captured with.
bool CudaStream::UsesRing(const void* src, size_t bytes, size_t rows) const {
  return !capturing_ && !waits_for_copies_ && UploadRing::Takes(src, bytes, rows);
}

void CudaStream::EndCopy(cudaError_t error) {
  if (waits_for_copies_ && error == cudaSuccess) error = cudaStreamSynchronize(handle_);
  gpu::KeepError(handle_, error);  // surfaces in Synchronize
}

absl::Status CudaStream::Fault() const {
  return StatusOf(gpu::KeptError(handle_), device().spec().name);
}

absl::Status CudaStream::WatchesHealthy() const {
  for (const WatchEntry& watch : watches_) RETURN_IF_ERROR(watch.healthy());
  return absl::OkStatus();
}

absl::Status CudaStream::Synchronize() {
  const absl::Status waited = Wait();
  return library_ != nullptr && !library_->error().ok() ? library_->error() : waited;
}

absl::Status CudaStream::Wait() {
  using Clock = std::chrono::steady_clock;
  const cudaStream_t stream = handle();
  if (watches_.empty()) {
    gpu::KeepError(stream, cudaStreamSynchronize(stream));
    return Fault();
  }
  constexpr auto kInterval = std::chrono::milliseconds(1);
  auto next_look = Clock::now() + kInterval;
  cudaError_t state = cudaStreamQuery(stream);
  for (; state == cudaErrorNotReady; state = cudaStreamQuery(stream)) {
    if (Clock::now() < next_look) continue;
    RETURN_IF_ERROR(WatchesHealthy());
    next_look = Clock::now() + kInterval;
  }
  // Once more at the end, for who keeps account of what the stream has done.
  RETURN_IF_ERROR(WatchesHealthy());
  gpu::KeepError(stream, state);
  return Fault();
}

absl::StatusOr<std::unique_ptr<Graph>> CudaStream::Capture(const std::function<void()>& work) {
  const std::string what = absl::StrCat(device().spec().name, ": capturing a graph");
  RETURN_IF_ERROR(Synchronize());
  const int64_t free_before = FreeBytes();
  RETURN_IF_ERROR(
      StatusOf(cudaStreamBeginCapture(handle_, cudaStreamCaptureModeThreadLocal), what));
  capturing_ = true;
  work();
  capturing_ = false;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaError_t error = cudaStreamEndCapture(handle_, &graph);
  // What `work` was refused is this capture's error, not that of the stream's next wait. A GPU that
  // is lost says so again.
  if (const cudaError_t of_work = gpu::TakeError(handle_); of_work != cudaSuccess) error = of_work;
  const absl::Status of_library =
      library_ != nullptr ? library_->TakeError() : absl::OkStatus();  // likewise
  if (error == cudaSuccess && of_library.ok()) error = cudaGraphInstantiate(&executable, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (executable != nullptr) error = cudaGraphUpload(executable, handle_);
  absl::Status status = error == cudaSuccess ? Synchronize() : StatusOf(error, what);
  if (!of_library.ok()) {
    status = absl::Status(of_library.code(),
                          absl::StrCat(what, ": ", std::string(of_library.message())));
  }
  if (!status.ok()) {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    cudaGetLastError();  // clears it: the next launch would take it for its own
    return status;
  }
  return std::make_unique<CudaGraph>(executable, std::max<int64_t>(0, free_before - FreeBytes()));
}

void CudaStream::Watch(const void* owner, std::function<absl::Status()> healthy) {
  for (const WatchEntry& watch : watches_) {
    if (watch.owner == owner) return;
  }
  watches_.push_back({owner, std::move(healthy)});
}

void CudaStream::EndWatch(const void* owner) {
  std::erase_if(watches_, [owner](const WatchEntry& watch) { return watch.owner == owner; });
}

}  // namespace trireme::cuda
