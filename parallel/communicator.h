// Communicator: hardware seam 2 of 2. Moves tensors between the ranks of one group: MPI (host
// memory), NCCL (device memory), or nothing for size 1. Stream-ordered: a call enqueues; inputs
// must stay untouched until the stream gets there; errors surface in Stream::Synchronize(). One
// thread at a time; all ranks of the group make the same calls in the same order. Sums are done in
// fp32 in rank order, so that they are the same in every run and on every rank.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/device.h"
#include "kernels/tensor.h"

namespace trireme {

class Communicator {
 public:
  virtual ~Communicator() = default;
  int rank() const { return rank_; }  // within the group
  int size() const { return size_; }

  // data = sum over ranks, in place. f32, bf16, f16; contiguous.
  virtual void AllReduceSum(Stream& stream, TensorView data) = 0;
  // out = the ranks' `in` one after the other: out.bytes() == size() * in.bytes(); contiguous, any
  // dtype.
  virtual void AllGather(Stream& stream, ConstTensorView in, TensorView out) = 0;
  // Point to point within the group, in order. Send gives a ticket; `data` must not be written
  // before WaitSend(ticket) has been enqueued, so a sender with two buffers overlaps sending with
  // computing.
  virtual int64_t Send(Stream& stream, ConstTensorView data, int peer) = 0;
  virtual void WaitSend(Stream& stream, int64_t ticket) = 0;
  virtual void Recv(Stream& stream, TensorView data, int peer) = 0;

  // Bytes this rank has sent and received so far.
  int64_t bytes_moved() const { return bytes_moved_; }

 protected:
  int rank_ = 0;
  int size_ = 1;
  int64_t bytes_moved_ = 0;
};

// A group of one: AllReduceSum does nothing, AllGather copies, Send/Recv are our fault.
std::unique_ptr<Communicator> NewSelfCommunicator();

}  // namespace trireme
