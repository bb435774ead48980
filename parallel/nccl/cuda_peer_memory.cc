#include "parallel/nccl/cuda_peer_memory.h"

#include <atomic>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/device.h"
#include "kernels/status.h"

namespace trireme {
namespace {

static_assert(kMaxPeerRanks == cuda::kMaxPeers);

// Of what one launch exchanges: one-shot sums of 512 KiB over 8 ranks, two-shot ones of nearly 2
// MiB, and more where there are fewer.
constexpr int64_t kHalfBytes = 4 << 20;
// CUDA hands out the whole of such a piece: what is smaller would share it with others.
constexpr int64_t kPieceBytes = 2 << 20;
constexpr size_t kBusIdBytes = 16;

std::string BusIdOf(int index) {
  char id[kBusIdBytes] = {};
  return cudaDeviceGetPCIBusId(id, sizeof(id), index) == cudaSuccess ? id : "";
}

absl::Status Failed(const std::string& what, cudaError_t error) {
  cudaGetLastError();  // clears it: the next launch would take it for its own
  return absl::UnavailableError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

int CurrentDevice() {
  int index = 0;
  cudaGetDevice(&index);
  return index;
}

}  // namespace

CudaPeerMemory::CudaPeerMemory(Device& device)
    : name_(device.spec().name),
      bus_id_(BusIdOf(CurrentDevice())),
      device_index_(CurrentDevice()) {}

absl::StatusOr<std::unique_ptr<PeerMemory>> CudaPeerMemory::Create(Device& device) {
  // Makes the device this thread's current one.
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.NewStream());
  std::unique_ptr<CudaPeerMemory> made(new CudaPeerMemory(device));
  RETURN_IF_ERROR(made->Allocate());
  return std::unique_ptr<PeerMemory>(std::move(made));
}

absl::Status CudaPeerMemory::Allocate() {
  const int64_t used = cuda::PeerMemoryBytes(kHalfBytes) + static_cast<int64_t>(sizeof(uint64_t));
  bytes_ = (used + kPieceBytes - 1) / kPieceBytes * kPieceBytes;
  void* memory = nullptr;
  if (const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes_));
      error != cudaSuccess)
    return Failed(absl::StrCat(name_, ": no ", bytes_, " bytes for sums over peers"), error);
  data_ = static_cast<char*>(memory);
  if (const cudaError_t error = cudaMemset(data_, 0, static_cast<size_t>(bytes_));
      error != cudaSuccess)
    return Failed(name_, error);
  // Zeros must lie there before another rank's kernel comes.
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess)
    return Failed(name_, error);
  if (const cudaError_t error = cudaIpcGetMemHandle(&handle_, data_); error != cudaSuccess)
    return Failed(absl::StrCat(name_, ": no interprocess handle"), error);
  void* word = nullptr;
  if (const cudaError_t error = cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped);
      error != cudaSuccess)
    return Failed(absl::StrCat(name_, ": no mapped host memory"), error);
  given_up_ = static_cast<uint32_t*>(word);
  *given_up_ = 0;
  return absl::OkStatus();
}

CudaPeerMemory::~CudaPeerMemory() {
  if (given_up_ != nullptr) cudaFreeHost(given_up_);
  if (data_ != nullptr) cudaFree(data_);
}

std::string CudaPeerMemory::handle() const {
  std::string bytes = bus_id_;
  bytes.resize(kBusIdBytes);
  return bytes.append(reinterpret_cast<const char*>(&handle_), sizeof(handle_));
}

absl::Status CudaPeerMemory::Open(int rank, std::span<const std::string> handles) {
  group_ = {.rank = rank, .size = static_cast<int>(handles.size()), .half_bytes = kHalfBytes};
  group_.memory[rank] = data_;
  group_.launched = reinterpret_cast<uint64_t*>(data_ + cuda::PeerMemoryBytes(kHalfBytes));
  void* word = nullptr;
  if (const cudaError_t error = cudaHostGetDevicePointer(&word, given_up_, 0); error != cudaSuccess)
    return Failed(name_, error);
  group_.given_up = static_cast<const uint32_t*>(word);
  for (int peer = 0; peer < group_.size; ++peer) {
    if (peer == rank) continue;
    const std::string& bytes = handles[peer];
    CHECK_EQ(bytes.size(), kBusIdBytes + sizeof(cudaIpcMemHandle_t));
    const std::string bus_id(bytes.c_str());
    const std::string what = absl::StrCat(name_, ": memory of the GPU at ", bus_id);
    // A GPU that this process does not see is opened on trial.
    int index = 0, reachable = 1;
    if (cudaDeviceGetByPCIBusId(&index, bus_id.c_str()) == cudaSuccess) {
      if (index == device_index_)
        return absl::UnavailableError(absl::StrCat("ranks share ", name_));
      cudaDeviceCanAccessPeer(&reachable, device_index_, index);
    }
    cudaGetLastError();
    if (reachable == 0) return absl::UnavailableError(absl::StrCat(what, ": no peer access"));
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, bytes.data() + kBusIdBytes, sizeof(handle));
    void* memory = nullptr;
    if (const cudaError_t error =
            cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
        error != cudaSuccess)
      return Failed(what, error);
    group_.memory[peer] = static_cast<char*>(memory);
  }
  return absl::OkStatus();
}

void CudaPeerMemory::Close() {
  cudaSetDevice(device_index_);
  for (int peer = 0; peer < group_.size; ++peer) {
    if (peer != group_.rank && group_.memory[peer] != nullptr)
      cudaIpcCloseMemHandle(group_.memory[peer]);
    group_.memory[peer] = nullptr;
  }
}

void CudaPeerMemory::GiveUp() { std::atomic_ref(*given_up_).store(1, std::memory_order_relaxed); }
bool CudaPeerMemory::given_up() const {
  return std::atomic_ref(*given_up_).load(std::memory_order_relaxed) != 0;
}

}  // namespace trireme
