#include "tests/host_cuda/device.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_library.h"
#include "kernels/status.h"
#include "tests/host_cuda/cublas_lt_double.h"

namespace trireme {
namespace {

// Of this thread. CUDA refuses what would wait or change memory's mapping meanwhile, and the
// capture is spoilt.
thread_local bool capture_under_way = false;
void CheckNoCapture(const char* what) { CHECK(!capture_under_way) << what << " during a capture"; }

class HostCudaGraph final : public Graph {
 public:
  explicit HostCudaGraph(host_cuda::Recording nodes)
      : Graph(static_cast<int64_t>(nodes.size()) * kNodeBytes), nodes_(std::move(nodes)) {}
  ~HostCudaGraph() override {
    if (HostCudaTestHooks().graph_gone) HostCudaTestHooks().graph_gone();
  }
  void Replay(Stream&) override {
    for (const auto& node : nodes_) node();
  }

 private:
  static constexpr int64_t kNodeBytes = 256;  // so that a ledger has something to count
  const host_cuda::Recording nodes_;
};

// Memory that is there while it is open. One thread's.
class HiddenMemory {
 public:
  static HiddenMemory& Get() {
    static HiddenMemory memory;
    return memory;
  }
  void* Map(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t rounded = (bytes + kPage) / kPage * kPage;
    void* data = mmap(nullptr, rounded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    mapped_[data] = rounded;
    return data;
  }
  void Unmap(void* data) {
    const auto it = mapped_.find(data);
    munmap(it->first, it->second);
    mapped_.erase(it);
  }
  void Open(bool open) {
    for (const auto& [data, bytes] : mapped_) {
      mprotect(data, bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
  }

 private:
  std::map<void*, size_t> mapped_;
};

class HostCudaStream final : public Stream {
 public:
  HostCudaStream(Device* device, bool hidden, const cuda::CublasLt* cublas)
      : Stream(device, &cuda::kOps),
        hidden_(hidden),
        library_(cublas != nullptr ? std::make_unique<cuda::MatMulLibrary>(*cublas) : nullptr) {}
  void Copy(void* dst, const void* src, size_t bytes) override {
    const auto copy = [=, this] {
      if (hidden_) HiddenMemory::Get().Open(true);
      if (bytes > 0) std::memmove(dst, src, bytes);
      if (hidden_) HiddenMemory::Get().Open(false);
    };
    if (capturing_ == nullptr) return copy();
    capturing_->push_back(copy);
  }
  absl::Status Synchronize() override {
    CHECK(capturing_ == nullptr) << "a capture cannot wait for the device";
    return library_ != nullptr ? library_->error() : absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(const std::function<void()>& work) override {
    host_cuda::Recording nodes;
    capturing_ = &nodes;
    capture_under_way = true;
    work();
    capture_under_way = false;
    capturing_ = nullptr;
    if (HostCudaTestHooks().captured) RETURN_IF_ERROR(HostCudaTestHooks().captured());
    if (library_ != nullptr) RETURN_IF_ERROR(library_->TakeError());
    return std::make_unique<HostCudaGraph>(std::move(nodes));
  }
  host_cuda::Recording* capturing() const { return capturing_; }
  cuda::MatMulLibrary* matmul_library() const { return library_.get(); }
  cuda::CodesRoom& codes_room() { return codes_room_; }
  cuda::MatMulRoom& parts_room() { return parts_room_; }

 private:
  host_cuda::Recording* capturing_ = nullptr;
  const bool hidden_;
  const std::unique_ptr<cuda::MatMulLibrary> library_;  // or null
  cuda::CodesRoom codes_room_;
  cuda::MatMulRoom parts_room_;
};

class HostCudaDevice final : public Device {
 public:
  explicit HostCudaDevice(bool hidden, std::unique_ptr<cuda::CublasLt> cublas = nullptr)
      : hidden_(hidden), cublas_(std::move(cublas)) {
    spec_.name = "host_cuda";
    spec_.multiprocessors = 2;  // so that persistent blocks have several items each
    spec_.host_memory = !hidden;
    spec_.max_head_dim = cuda::kMaxHeadDim;
    spec_.max_cache_rows = cuda::kMaxCacheRows;
    spec_.max_page_reach = cuda::kMaxPageReach;
    if (!hidden) return;
    host_cuda::DefaultOptions().around_launch = [](bool begins) {
      HiddenMemory::Get().Open(begins);
    };
  }
  ~HostCudaDevice() override {
    if (hidden_) host_cuda::DefaultOptions().around_launch = nullptr;
  }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    CheckNoCapture("an allocation");
    if (HostCudaTestHooks().allocating) RETURN_IF_ERROR(HostCudaTestHooks().allocating(bytes));
    allocated_bytes_ += static_cast<int64_t>(bytes);
    if (hidden_) {
      void* data = HiddenMemory::Get().Map(bytes);
      if (data == nullptr)
        return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
      return Buffer(data, bytes, [](void* memory, size_t) {
        CheckNoCapture("a free");
        HiddenMemory::Get().Unmap(memory);
      });
    }
    constexpr size_t kAlignment = 256;
    const size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
    void* data = std::aligned_alloc(kAlignment, rounded);
    if (data == nullptr)
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
    std::memset(data, 0, rounded);
    return Buffer(data, bytes, [](void* memory, size_t) {
      CheckNoCapture("a free");
      std::free(memory);
    });
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return std::make_unique<HostCudaStream>(this, hidden_, cublas_.get());
  }

 private:
  const bool hidden_;
  const std::unique_ptr<cuda::CublasLt> cublas_;  // or null
};

}  // namespace

HostCudaHooks& HostCudaTestHooks() {
  static HostCudaHooks hooks;
  return hooks;
}

std::unique_ptr<Device> NewHostCudaDevice(bool hidden) {
  return std::make_unique<HostCudaDevice>(hidden);
}

absl::StatusOr<std::unique_ptr<Device>> NewHostCudaDeviceWithCublasLt(const std::string& file) {
  ASSIGN_OR_RETURN(std::unique_ptr<cuda::CublasLt> cublas,
                   cuda::CublasLt::Open(file.empty() ? TRIREME_CUBLAS_LT_DOUBLE : file));
  cublas->scales_rows = TRIREME_CUBLAS_LT_SCALES_ROWS;
  return std::make_unique<HostCudaDevice>(/*hidden=*/false, std::move(cublas));
}

CublasLtDouble& TheCublasLtDouble() {
  static CublasLtDouble* const found = [] {
    void* const library = dlopen(TRIREME_CUBLAS_LT_DOUBLE, RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr) << dlerror();
    using Function = CublasLtDouble* (*)();
    return reinterpret_cast<Function>(dlsym(library, "trireme_cublas_lt_double"))();
  }();
  return *found;
}

namespace cuda {
gpu::StreamHandle NativeHandle(Stream& stream) {
  return static_cast<HostCudaStream&>(stream).capturing();
}
MatMulLibrary* LibraryOf(Stream& stream) {
  return static_cast<HostCudaStream&>(stream).matmul_library();
}
CodesRoom& CodesRoomOf(Stream& stream) { return static_cast<HostCudaStream&>(stream).codes_room(); }
MatMulRoom& PartsRoomOf(Stream& stream) {
  return static_cast<HostCudaStream&>(stream).parts_room();
}
}  // namespace cuda

}  // namespace trireme
