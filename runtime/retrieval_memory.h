// The host's arrays as arguments of a device's ops. Where the host can read the device's memory
// they are the arrays themselves, and nothing is copied; elsewhere their memory comes from an arena
// that was reserved before, so that a collective call does not fail half way for want of it.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace trireme {

// What an OpInput or OpOutput of this shape takes of its arena.
inline size_t ArgumentBytes(bool host_memory, DType dtype, const Shape& shape) {
  return host_memory ? 0 : Arena::Footprint(dtype, shape);
}

// What an op reads. The array must stay as it is until the stream has been waited for.
template <typename T>
class OpInput {
 public:
  OpInput() = default;
  OpInput(Stream& stream, Arena& memory, const T* data, const Shape& shape)
      : view_(data, kDTypeOf<T>, shape) {
    // Never null, so that an empty list is still there.
    static const T kNone{};
    if (data == nullptr) view_.data = &kNone;
    if (stream.device().spec().host_memory) return;
    const TensorView copy = memory.Allocate(view_.dtype, shape);
    stream.Copy(copy.data, data, view_.bytes());
    view_ = copy;
  }
  ConstTensorView view() const { return view_; }

 private:
  ConstTensorView view_;
};

// A host array that an op fills.
template <typename T>
class OpOutput {
 public:
  OpOutput(Stream& stream, Arena& memory, T* data, DType dtype, const Shape& shape)
      : host_(data), view_(data, dtype, shape) {
    if (!stream.device().spec().host_memory) view_ = memory.Allocate(dtype, shape);
  }
  TensorView view() const { return view_; }
  // Enqueues the way to the host, after the op.
  void Fetch(Stream& stream) const {
    if (view_.data != host_) stream.Copy(host_, view_.data, view_.bytes());
  }

 private:
  T* host_;
  TensorView view_;
};

// Frees what is allocated of an arena within its scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.used()) {}
  ~ArenaScope() { arena_.Rewind(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  const size_t mark_;
};

// Memory that searches have one after the other: as many arenas as there ever were searches at the
// same time, each as large as the largest it was needed for. Any thread.
class ArenaPool {
 public:
  // At least `bytes`, empty. ResourceExhausted when it must grow and the device lacks the memory;
  // then what was there stays, for those that it suffices for.
  absl::StatusOr<Arena> Take(Device& device, size_t bytes) {
    Arena arena;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        arena = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (arena.capacity() >= bytes) return arena;
    const size_t before = arena.capacity();
    arena = Arena();  // first gives back what it had
    absl::StatusOr<Arena> grown = Arena::Create(device, bytes);
    if (grown.ok() || before == 0) return grown;
    if (absl::StatusOr<Arena> again = Arena::Create(device, before); again.ok())
      Give(*std::move(again));
    return grown;
  }
  // Of those that are here.
  int64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = 0;
    for (const Arena& arena : free_) sum += arena.capacity();
    return static_cast<int64_t>(sum);
  }
  void Give(Arena arena) {
    if (arena.capacity() == 0) return;
    arena.Reset();
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Arena> free_;
};

}  // namespace trireme
