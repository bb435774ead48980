// Collectives of ranks on one host through a window of shared memory: each rank has a flag and two
// slots that all the others read. Used by the MPI communicator when its whole group shares a host;
// a group that does not uses messages. One thread at a time; all ranks make the same calls with the
// same sizes in the same order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/dtype.h"

namespace trireme {

class SharedWindow {
 public:
  // Collective over the communicator with this Fortran handle (which keeps mpi.h out of here),
  // which must outlive the window. Null on all ranks when they do not share a host, or when the
  // host has no shared memory left.
  static std::unique_ptr<SharedWindow> Create(int fortran_comm);
  ~SharedWindow();  // collective

  // Of the host's memory that each rank adds.
  static int64_t BytesOfRank();

  // data [n] = sum over ranks in rank order (SumInOrder), in place. f32, bf16 or f16.
  void AllReduceSum(DType dtype, int64_t n, void* data);
  // out [size * bytes] = the ranks' in [bytes] one after the other; `in` may be its place in `out`.
  void AllGather(const void* in, int64_t bytes, void* out);

 private:
  struct Region;
  struct Handle;
  SharedWindow();
  void SumWhole(DType dtype, int64_t n, char* data);
  void SumPieces(DType dtype, int64_t n, char* data);
  char* Slot(int rank) const;
  void PublishAndWait();
  void Progress();

  std::unique_ptr<Handle> handle_;
  std::vector<Region*> regions_;  // by rank
  std::vector<const void*> inputs_;
  int rank_ = 0, size_ = 1;
  uint64_t phase_ = 0;   // PublishAndWait calls so far
  uint64_t rounds_ = 0;  // uses of a slot so far; they alternate
};

}  // namespace trireme
