// Communicator: hardware seam 2 of 2. Moves tensors between the ranks of one group: MPI (host
// memory), NCCL (device memory), or nothing for size 1. Stream-ordered: a call enqueues; inputs
// must stay untouched until the stream gets there; errors surface in Stream::Synchronize(). One
// thread at a time; all ranks of the group make the same calls in the same order. Sums are done in
// fp32 in rank order, so that they are the same in every run and on every rank. Every call leaves a
// flight record; where calls are enqueued, of the time that the stream spends in them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "parallel/flight_recorder.h"

namespace trireme {

class Communicator {
 public:
  virtual ~Communicator() = default;
  int rank() const { return rank_; }  // within the group
  int size() const { return size_; }

  // data = sum over ranks, in place. f32, bf16, f16; contiguous.
  void AllReduceSum(Stream& stream, TensorView data) {
    Recorded({CommOp::kAllReduce, group_index_, data.bytes()},
             [&] { DoAllReduceSum(stream, data); });
  }
  // residual += the sum over ranks of data, out = Norm(residual): shapes as in AddNorm
  // (kernels/ops.h), with data for its delta. The bits are those of AllReduceSum and AddNorm.
  // What is left in data is of no use.
  void AllReduceAddNorm(Stream& stream, TensorView data, TensorView residual,
                        const NormParams& norm, TensorView out) {
    if (!FusesNorm(data)) {
      AllReduceSum(stream, data);
      return AddNorm(stream, residual, data, norm, out);
    }
    CheckAddNorm(residual, data, norm, out);
    Recorded({CommOp::kAllReduce, group_index_, data.bytes()},
             [&] { DoAllReduceAddNorm(stream, data, residual, norm, out); });
  }
  // Whether that is one kernel here, for such a sum.
  virtual bool FusesNorm(ConstTensorView /*data*/) const { return false; }
  // out = the ranks' `in` one after the other: out.bytes() == size() * in.bytes(); contiguous, any
  // dtype.
  void AllGather(Stream& stream, ConstTensorView in, TensorView out) {
    Recorded({CommOp::kAllGather, group_index_, in.bytes()}, [&] { DoAllGather(stream, in, out); });
  }
  // Point to point within the group, in order. Send gives a ticket; `data` must not be written
  // before WaitSend(ticket) has been enqueued, so a sender with two buffers overlaps sending with
  // computing.
  int64_t Send(Stream& stream, ConstTensorView data, int peer) {
    int64_t ticket = 0;
    Recorded({CommOp::kSend, group_index_, data.bytes(), group_.RankOf(peer)},
             [&] { ticket = DoSend(stream, data, peer); });
    return ticket;
  }
  void WaitSend(Stream& stream, int64_t ticket) {
    Recorded({CommOp::kWaitSend, group_index_, 0}, [&] { DoWaitSend(stream, ticket); });
  }
  void Recv(Stream& stream, TensorView data, int peer) {
    Recorded({CommOp::kRecv, group_index_, data.bytes(), group_.RankOf(peer)},
             [&] { DoRecv(stream, data, peer); });
  }

  // --- Of the failure detector, on threads of its own, while others make calls. ---
  // What has gone wrong in calls that are enqueued; OK while nothing has, and where a call that
  // fails ends the process itself (MPI). Brings the records of enqueued calls up to date.
  virtual absl::Status Poll() { return absl::OkStatus(); }
  // The job has failed: calls that wait for other ranks come to an end, with meaningless results,
  // and further ones do nothing. Where only the end of the process does that (MPI), nothing
  // happens.
  virtual void Abort() {}

  // Who makes a communicator says what it is in flight records. `recorder` may be null: nothing is
  // recorded.
  void RecordWith(FlightRecorder* recorder, const CommGroup& group) {
    recorder_ = recorder;
    group_ = group;
    if (recorder != nullptr) group_index_ = recorder->AddGroup(group);
  }
  const CommGroup& group() const { return group_; }  // its ranks in the world

  // Start-up, in two steps, so that a rank which lacks memory never leaves the others waiting: all
  // ranks agree that the first has succeeded before any takes the second.
  // Takes the memory that sums of up to so many bytes, and gathers, will need, so that they
  // allocate nothing, and what ChooseSums works in. ResourceExhausted says what for. Waits for no
  // rank.
  virtual absl::Status Reserve(int64_t /*max_bytes*/) { return absl::OkStatus(); }
  // Finds out with the other ranks how such sums travel. Collective. REQUIRES: Reserve has
  // succeeded with as much, on all ranks.
  virtual void ChooseSums(int64_t /*max_bytes*/) {}
  // Of memory of the kind it moves, held by this rank for the calls above. What NCCL holds itself
  // it does not tell.
  virtual int64_t buffer_bytes() const { return 0; }
  // Its collectives are messages between hosts. Known after ChooseSums, or the first collective.
  virtual bool spans_hosts() const { return false; }
  // Its collectives may be part of what Stream::Capture records, once they have been called with as
  // much before, or Reserve has. A group of one moves nothing.
  virtual bool capturable() const { return size_ == 1; }

  // For people: what ChooseSums decided; empty where there was nothing to decide.
  virtual std::string DescribeSums() const { return ""; }

  // Bytes this rank has sent and received so far.
  int64_t bytes_moved() const { return bytes_moved_; }

 protected:
  virtual void DoAllReduceSum(Stream& stream, TensorView data) = 0;
  // Where FusesNorm says so.
  virtual void DoAllReduceAddNorm(Stream&, TensorView, TensorView, const NormParams&, TensorView) {
    Fatal(__FILE__, __LINE__, "no norm is fused with sums here");
  }
  virtual void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) = 0;
  virtual int64_t DoSend(Stream& stream, ConstTensorView data, int peer) = 0;
  virtual void DoWaitSend(Stream& stream, int64_t ticket) = 0;
  virtual void DoRecv(Stream& stream, TensorView data, int peer) = 0;

  // For destructors that are collective.
  FlightRecorder::Scope RecordFree() const {
    return FlightRecorder::Scope(recorder_, CommOp::kFree, group_index_, 0);
  }

  int rank_ = 0;
  int size_ = 1;
  int64_t bytes_moved_ = 0;
  // Set where calls are enqueued: the call that is being made is left here, with its recorder, for
  // the implementation to add it to its EnqueuedCalls.
  bool enqueues_ = false;
  CommCall call_;
  FlightRecorder* recorder() const { return recorder_; }

 private:
  template <typename Call>
  void Recorded(const CommCall& what, const Call& call) {
    if (recorder_ == nullptr) return call();
    if (enqueues_) {
      call_ = recorder_->Now(what);
      return call();
    }
    const FlightRecorder::Scope scope(recorder_, what.op, what.group, what.bytes, what.peer);
    call();
  }

  FlightRecorder* recorder_ = nullptr;
  CommGroup group_;
  int group_index_ = 0;
};

// A group of one: AllReduceSum does nothing, AllGather copies, Send/Recv are our fault.
std::unique_ptr<Communicator> NewSelfCommunicator();

}  // namespace trireme
