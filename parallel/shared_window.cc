#include "parallel/shared_window.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "kernels/check.h"
#include "parallel/mpi_check.h"
#include "parallel/rank_sum.h"
#include "parallel/topology.h"

namespace trireme {
namespace {

// A slot's worth is copied in, summed and copied out before the next, so that it stays in the
// cache: 256 KiB is a quarter of a 1 MiB L2. With two slots a rank takes 512 KiB of the host's
// shared memory. (1 MiB, 2 ranks, busy host: 187 us; slots of 64 KiB 527 us, of 1 MiB 620 us.)
constexpr int64_t kSlotBytes = 256 << 10;

// While all slots together hold no more than this, every rank sums the whole array: size x n bytes
// read, one wait. Above, each sums a piece: 2 n bytes read and a second wait. 32 KiB are read from
// a neighbour's cache in about 2 us (16 GB/s), which is what the second wait costs. (16 KiB, 2
// ranks: 5.2 us whole, 7.3 in pieces; 8 KiB, 4 ranks on 2 cores: 14.1, 18.3.)
constexpr int64_t kWholeBytes = 32 << 10;

// Polls of a flag before a waiting rank offers its core: 20 x about 15 ns (a pause instruction)
// meets a peer that runs at the same pace; one that does not run needs the core. (4 ranks on 2 busy
// cores, 4 B: 13 us; with 200 polls 39 us.)
constexpr int kSpins = 20;

// MPI moves large messages only inside its calls. A rank waiting here may have sent one that its
// peers wait for, so a long wait must let MPI work.
constexpr int kYieldsPerProgress = 8;

inline void CpuPause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct SharedWindow::Region {
  // A line of its own: others poll it while the slots are written.
  alignas(128) std::atomic<uint64_t> phase{0};
  alignas(128) char slots[2][kSlotBytes];
};

struct SharedWindow::Handle {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Win window = MPI_WIN_NULL;
};

// Open MPI aligns a segment to 8 bytes only: each rank says where its region begins in its segment.
int64_t SharedWindow::BytesOfRank() { return sizeof(Region) + alignof(Region); }

SharedWindow::SharedWindow() : handle_(std::make_unique<Handle>()) {}

std::unique_ptr<SharedWindow> SharedWindow::Create(int fortran_comm) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free, "flags must work between processes");
  std::unique_ptr<SharedWindow> result(new SharedWindow);
  MPI_Comm comm = MPI_Comm_f2c(fortran_comm);
  result->handle_->comm = comm;
  MPI_CHECK(MPI_Comm_rank(comm, &result->rank_));
  MPI_CHECK(MPI_Comm_size(comm, &result->size_));
  MPI_Comm host = MPI_COMM_NULL;
  MPI_CHECK(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host));
  int host_size = 0;
  MPI_CHECK(MPI_Comm_size(host, &host_size));
  MPI_CHECK(MPI_Comm_free(&host));
  if (host_size != result->size_) return nullptr;

  void* mine = nullptr;
  MPI_Win& window = result->handle_->window;
  int ok =
      MPI_Win_allocate_shared(BytesOfRank(), 1, MPI_INFO_NULL, comm, &mine, &window) == MPI_SUCCESS;
  if (!ok) window = MPI_WIN_NULL;
  MPI_CHECK(MPI_Allreduce(MPI_IN_PLACE, &ok, 1, MPI_INT, MPI_MIN, comm));
  if (!ok) return nullptr;
  const int64_t misaligned =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(mine) % alignof(Region));
  const int64_t offset = misaligned == 0 ? 0 : static_cast<int64_t>(alignof(Region)) - misaligned;
  std::vector<int64_t> offsets(static_cast<size_t>(result->size_));
  MPI_CHECK(MPI_Allgather(&offset, 1, MPI_INT64_T, offsets.data(), 1, MPI_INT64_T, comm));
  for (int r = 0; r < result->size_; ++r) {
    MPI_Aint bytes = 0;
    int unit = 0;
    void* address = nullptr;
    MPI_CHECK(MPI_Win_shared_query(window, r, &bytes, &unit, &address));
    result->regions_.push_back(reinterpret_cast<Region*>(static_cast<char*>(address) + offsets[r]));
    CHECK_EQ(reinterpret_cast<uintptr_t>(result->regions_.back()) % alignof(Region), 0u);
  }
  new (&result->regions_[result->rank_]->phase) std::atomic<uint64_t>(0);
  MPI_CHECK(MPI_Barrier(comm));
  return result;
}

SharedWindow::~SharedWindow() {
  if (handle_->window != MPI_WIN_NULL) MPI_Win_free(&handle_->window);
}

char* SharedWindow::Slot(int rank) const { return regions_[rank]->slots[rounds_ % 2]; }

// After it, all ranks' writes before their call are visible here. A slot may be written again two
// rounds later without another wait: whoever published the round in between had finished reading.
void SharedWindow::PublishAndWait() {
  ++phase_;
  regions_[rank_]->phase.store(phase_, std::memory_order_release);
  int polls = 0;
  for (Region* region : regions_) {
    while (region->phase.load(std::memory_order_acquire) < phase_) {
      if (++polls < kSpins) {
        CpuPause();
      } else {
        if (polls % kYieldsPerProgress == 0) Progress();
        sched_yield();
      }
    }
  }
}

void SharedWindow::Progress() {
  int found = 0;
  MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, handle_->comm, &found, MPI_STATUS_IGNORE));
}

void SharedWindow::AllReduceSum(DType dtype, int64_t n, void* data) {
  const int64_t item = static_cast<int64_t>(SizeOf(dtype)), slot = kSlotBytes / item;
  const bool whole = n * item * size_ <= kWholeBytes;
  for (int64_t begin = 0; begin < n; begin += slot, ++rounds_) {
    char* part = static_cast<char*>(data) + begin * item;
    const int64_t count = std::min(slot, n - begin);
    std::memcpy(Slot(rank_), part, static_cast<size_t>(count * item));
    whole ? SumWhole(dtype, count, part) : SumPieces(dtype, count, part);
  }
}

void SharedWindow::SumWhole(DType dtype, int64_t n, char* data) {
  PublishAndWait();
  inputs_.clear();
  for (int r = 0; r < size_; ++r) inputs_.push_back(Slot(r));
  SumInOrder(dtype, inputs_, n, data);
}

void SharedWindow::SumPieces(DType dtype, int64_t n, char* data) {
  const int64_t item = static_cast<int64_t>(SizeOf(dtype));
  // Pieces begin at whole cache lines, so that no two ranks write into one.
  const auto piece = [&](int r) { return PieceOf(n, size_, r, 64 / item); };
  PublishAndWait();
  const Range mine = piece(rank_);
  inputs_.clear();
  for (int r = 0; r < size_; ++r) inputs_.push_back(Slot(r) + mine.begin * item);
  // The sum replaces this rank's own input of the piece: nobody else reads that.
  SumInOrder(dtype, inputs_, mine.size(), Slot(rank_) + mine.begin * item);
  PublishAndWait();
  for (int r = 0; r < size_; ++r) {
    const Range range = piece(r);
    std::memcpy(data + range.begin * item, Slot(r) + range.begin * item,
                static_cast<size_t>(range.size() * item));
  }
}

void SharedWindow::AllGather(const void* in, int64_t bytes, void* out) {
  for (int64_t begin = 0; begin < bytes; begin += kSlotBytes, ++rounds_) {
    const auto count = static_cast<size_t>(std::min(kSlotBytes, bytes - begin));
    const char* mine = static_cast<const char*>(in) + begin;
    std::memcpy(Slot(rank_), mine, count);
    PublishAndWait();
    for (int r = 0; r < size_; ++r) {
      char* place = static_cast<char*>(out) + r * bytes + begin;
      if (place != mine) std::memcpy(place, Slot(r), count);
    }
  }
}

}  // namespace trireme
