// Device and Stream: hardware seam 1 of 2 (the other is parallel/communicator.h). A Device owns
// memory and makes Streams; a Stream is an ordered queue of ops. The CPU's stream runs inline: an
// op is done when its call returns. Threads: a Device may be used from any thread, a Stream from
// one thread at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace trireme {

struct OpTable;
class Stream;

// Owns device memory, aligned to 256 bytes. Move-only; must not outlive its Device.
class Buffer {
 public:
  using Free = void (*)(void* data, size_t bytes);
  Buffer() = default;
  Buffer(void* data, size_t bytes, Free free) : data_(data), bytes_(bytes), free_(free) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) free_(data_, bytes_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Free free_ = nullptr;
};

struct DeviceSpec {
  std::string name;          // "cpu", later "cuda:0 NVIDIA H200"
  int threads = 1;           // CPU: threads an op may use
  bool host_memory = true;   // device pointers may be read by the host
  int64_t memory_bytes = 0;  // total memory of the device
  std::string identity;      // of the accelerator on its host; empty for the CPU
  int multiprocessors = 1;   // GPU: blocks that run side by side, at the least
  // What PagedAttention takes; 0: any.
  int64_t max_head_dim = 0;
  int64_t max_cache_rows = 0;  // tokens of all pages times kv heads
  int64_t max_page_reach = 0;  // tokens of a sequence's pages times tokens of a page
};

class Device {
 public:
  virtual ~Device() = default;
  const DeviceSpec& spec() const { return spec_; }
  // Zero-filled. Fails with ResourceExhausted naming the bytes asked for.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  // Memory of the host, zero-filled, that a copy from this device reaches without the host's help:
  // such a copy queues like any other work. Into ordinary memory it may take until all before it is
  // done. May be ordinary memory where that makes no difference.
  virtual absl::StatusOr<Buffer> AllocateHost(size_t bytes);
  virtual absl::StatusOr<std::unique_ptr<Stream>> NewStream() = 0;
  // Bytes of all buffers so far, those that are gone included; 0 where the backend does not count.
  int64_t allocated_bytes() const { return allocated_bytes_; }

 protected:
  DeviceSpec spec_;
  std::atomic<int64_t> allocated_bytes_ = 0;
};

// Work of a stream, recorded once and enqueued again with one call. Made by Stream::Capture; it
// reads and writes the addresses it was recorded with, which must outlive it.
class Graph {
 public:
  explicit Graph(int64_t bytes) : bytes_(bytes) {}
  virtual ~Graph() = default;
  virtual void Replay(Stream& stream) = 0;
  int64_t bytes() const { return bytes_; }  // of device memory that it holds

 private:
  int64_t bytes_;
};

class Stream {
 public:
  virtual ~Stream() = default;
  const OpTable& ops() const { return *ops_; }
  Device& device() const { return *device_; }
  // Either side may be host or device memory. Host memory that is copied from may be written again
  // when the call returns, unless it comes from AllocateHost.
  virtual void Copy(void* dst, const void* src, size_t bytes) = 0;
  // The same for `rows` rows of so many bytes, which begin a stride apart; what lies between them
  // stays as it is.
  virtual void CopyRows(void* dst, size_t dst_stride, const void* src, size_t src_stride,
                        size_t bytes, size_t rows) {
    for (size_t r = 0; r < rows; ++r)
      Copy(static_cast<char*>(dst) + r * dst_stride, static_cast<const char*>(src) + r * src_stride,
           bytes);
  }
  // Waits for everything enqueued so far; reports what went wrong in it. What an accelerator could
  // not do stays with its stream: every later call reports the same.
  virtual absl::Status Synchronize() = 0;
  // What is known by now to have gone wrong, without waiting.
  virtual absl::Status Fault() const { return absl::OkStatus(); }
  // Records what `work` enqueues on this stream, without doing it. Unimplemented where a stream
  // runs inline; any other error says why this work cannot be recorded.
  virtual absl::StatusOr<std::unique_ptr<Graph>> Capture(const std::function<void()>& work);

 protected:
  Stream(Device* device, const OpTable* ops) : device_(device), ops_(ops) {}
  Device* device_;
  const OpTable* ops_;
};

struct DeviceOptions {
  std::string name = "cpu";
  int threads = 0;            // CPU: threads an op may use; 0 = all cores this process may run on
  int local_index = 0;        // which of the host's accelerators
  bool allow_shared = false;  // several ranks may use one accelerator
  // A kernel's blocks may come to the accelerator before the kernel ahead of it has ended, where
  // the chip can (9.0 and later). Changes no result.
  bool dependent_launches = false;
  // Matmuls of more rows than a matvec's by cuBLASLt, on a GPU and where ReserveMatMul has made
  // room. Their sums' order hangs on the rows beside, and so do a row's bits.
  bool cublas_lt = false;
  // An accelerator's memory may be read by the host too, and copies are done when their call
  // returns: for tests, which look at everything.
  bool host_readable = false;
};
// Opens a device by name. Unknown name, or one this machine lacks: InvalidArgument / Unavailable.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const DeviceOptions& options);

// A tensor that owns its memory.
class Tensor {
 public:
  Tensor() = default;
  static absl::StatusOr<Tensor> Create(Device& device, DType dtype, Shape shape);
  TensorView view() const { return view_; }
  int64_t bytes() const { return static_cast<int64_t>(buffer_.bytes()); }
  explicit operator bool() const { return view_.data != nullptr; }

 private:
  Buffer buffer_;
  TensorView view_;
};

// Bump allocator over one Buffer, for a step's activations. Addresses never move; Reset() makes the
// whole of it free again, so the same calls after a Reset give the same addresses. Asking for more
// than is left is our fault: CHECK.
class Arena {
 public:
  Arena() = default;
  static absl::StatusOr<Arena> Create(Device& device, size_t bytes);
  TensorView Allocate(DType dtype, Shape shape);
  void Reset() { used_ = 0; }
  // Frees what was allocated since used() was `mark`.
  void Rewind(size_t mark) { used_ = mark; }
  size_t used() const { return used_; }
  size_t peak() const { return peak_; }
  size_t capacity() const { return buffer_.bytes(); }
  // What Allocate takes from the arena for this tensor, padding included.
  static size_t Footprint(DType dtype, const Shape& shape);

 private:
  Buffer buffer_;
  size_t used_ = 0;
  size_t peak_ = 0;
};

}  // namespace trireme
