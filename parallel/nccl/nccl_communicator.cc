// The communicator for device memory over NCCL.
//
// Sums keep the promise of communicator.h, fp32 in rank order, in which NCCL's own all-reduce does
// not: it adds on the way, rounding to the type at each rank. So the parts travel (all-gather while
// they are few bytes, else a scatter of pieces and a gather of sums, which moves what a ring does)
// and RankSum adds them. With two ranks there is only one order and one rounding, and NCCL's
// all-reduce gives the same bits.
//
// Small sums of ranks that reach each other's memory take one launch of our own instead, alone or
// with the norm behind them: which ones, ChooseSums measures (parallel/nccl/peer_sums.h).
//
// A stage's messages to the stage after and from the one before are two communicators of two ranks
// each: on one of them NCCL would finish a receive before the send behind it began. Sends run on a
// stream of their own, beside the computation.
//
// What the flight records say of a call is when the stream came to it and when it had passed it:
// two events around each (parallel/enqueued_calls.h). Calls that are captured into a graph leave
// none.
#include <algorithm>
#include <deque>
#include <optional>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rank_sum.h"
#include "kernels/cuda/stream_errors.h"
#include "kernels/status.h"
#include "parallel/enqueued_calls.h"
#include "parallel/nccl/nccl_api.h"
#include "parallel/nccl/nccl_comm.h"
#include "parallel/nccl/peer_sums.h"
#include "parallel/nccl_module.h"

namespace trireme {
namespace {

using cuda::CudaStream;

// Below, latency counts: one exchange. Above, bytes do: two exchanges of a ring's traffic.
constexpr int64_t kGatherBytes = 256 << 10;

ncclDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kF16:
      return ncclFloat16;
    default:
      Fatal(__FILE__, __LINE__, std::string("a sum of ") + Name(dtype));
  }
}

using gpu::KeepError;  // who waits for the stream hears of it

// Any thread. What cannot be asked any more (the device is lost) has been passed: who synchronises
// hears of it.
bool Passed(EnqueuedCalls::Mark event) {
  return cudaEventQuery(static_cast<cudaEvent_t>(event)) != cudaErrorNotReady;
}

class NcclCommunicator final : public Communicator {
 public:
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(const NcclGroup& group,
                                                              Device& device) {
    ASSIGN_OR_RETURN(const NcclApi* const nccl, OpenNccl());
    // First of all: it makes the device this thread's current one, and that is the GPU which NCCL
    // joins with and which events are of.
    ASSIGN_OR_RETURN(std::unique_ptr<Stream> side_stream, device.NewStream());
    std::unique_ptr<NcclCommunicator> made(
        new NcclCommunicator(*nccl, group, device, std::move(side_stream)));
    if (group.collectives)
      RETURN_IF_ERROR(made->Join(group.ids[0].group, group.size, group.rank, made->all_));
    if (group.pipeline) RETURN_IF_ERROR(made->JoinNeighbours(group));
    return std::unique_ptr<Communicator>(std::move(made));
  }
  ~NcclCommunicator() override {
    for (CudaStream* stream : watched_) stream->EndWatch(this);
    for (EnqueuedCalls* calls : {&calls_, &side_calls_}) {
      for (void* event : calls->TakeAll()) cudaEventDestroy(static_cast<cudaEvent_t>(event));
    }
    for (const Sent& sent : sent_) cudaEventDestroy(sent.done);
    if (ready_ != nullptr) cudaEventDestroy(ready_);
  }

  absl::Status Poll() override {
    // On a new thread another GPU would be the current one, and get a context.
    cudaSetDevice(static_cast<CudaStream&>(*side_stream_).device_index());
    calls_.Look();
    side_calls_.Look();
    for (NcclComm* comm : {all_.get(), previous_.get(), next_.get()}) {
      if (comm != nullptr) RETURN_IF_ERROR(comm->Poll());
    }
    return absl::OkStatus();
  }
  void Abort() override {
    if (peers_) peers_->GiveUp();
    for (NcclComm* comm : {all_.get(), previous_.get(), next_.get()}) {
      if (comm != nullptr) comm->Abort();
    }
  }

  // Between ranks that share a GPU the host waits around each call.
  bool capturable() const override { return !shared_gpu_; }
  // Of the calls' own memory; a graph that holds its address must not see it grow.
  absl::Status Reserve(int64_t max_bytes) override {
    if (all_ == nullptr) return absl::OkStatus();
    RETURN_IF_ERROR(TakeScratch(ScratchBytes(max_bytes)));
    return peers_ ? peers_->Reserve(device_, max_bytes) : absl::OkStatus();
  }
  void ChooseSums(int64_t max_bytes) override {
    if (all_ != nullptr && peers_) MeasurePeers(max_bytes);
  }
  int64_t buffer_bytes() const override {
    return static_cast<int64_t>(scratch_.bytes()) + (peers_ ? peers_->bytes() : 0);
  }

  std::string DescribeSums() const override {
    if (!peers_) return "";
    const SumLimits& limits = peers_->limits();
    return absl::StrCat("sums over peer memory: up to ", limits.one_shot, " B one-shot, up to ",
                        limits.two_shot, " B two-shot");
  }

  void DoAllReduceSum(Stream& stream, TensorView data) override {
    CHECK(all_ != nullptr && data.contiguous());
    if (data.elements() == 0) return;
    cudaStream_t handle = Enter(stream);
    if (const auto path = peers_ ? peers_->PathOf(data) : std::nullopt) {
      peers_->Sum(handle, *path, data);
      bytes_moved_ += peers_->MovedBytes(*path, data.bytes());
    } else {
      NcclSum(handle, data);
      bytes_moved_ += 2 * data.bytes() * (size_ - 1) / size_;
    }
    Leave(stream);
  }
  bool FusesNorm(ConstTensorView data) const override {
    return peers_ && peers_->PathOfNorm(data).has_value();
  }
  void DoAllReduceAddNorm(Stream& stream, TensorView data, TensorView residual,
                          const NormParams& norm, TensorView out) override {
    const cuda::PeerPath path = *peers_->PathOfNorm(data);
    peers_->SumAddNorm(Enter(stream), path, data, residual, norm, out);
    bytes_moved_ += peers_->MovedBytes(path, data.bytes());
    Leave(stream);
  }

  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    CHECK(all_ != nullptr && in.contiguous() && out.contiguous());
    CHECK_EQ(in.bytes() * size_, out.bytes());
    if (in.bytes() == 0) return;
    cudaStream_t handle = Enter(stream);
    GatherBytes(handle, in.data, out.data, in.bytes());
    bytes_moved_ += 2 * in.bytes() * (size_ - 1);
    Leave(stream);
  }

  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    CHECK(data.contiguous());
    CHECK(peer == rank_ + 1 && next_ != nullptr) << "rank " << rank_ << " sends to " << peer;
    cudaStream_t side = static_cast<CudaStream&>(*side_stream_).handle();
    cudaStream_t handle = Watched(stream);
    KeepError(handle, cudaEventRecord(ready_, handle));
    KeepError(handle, cudaStreamWaitEvent(side, ready_, 0));
    BeginRecord(side_calls_, side);
    next_->Do("send", [&](ncclComm_t comm) {
      return nccl_.Send(data.data, static_cast<size_t>(data.bytes()), ncclUint8, 1, comm, side);
    });
    EndRecord(side_calls_, side);
    Sent sent{.ticket = next_ticket_++};
    KeepError(handle, cudaEventCreateWithFlags(&sent.done, cudaEventDisableTiming));
    KeepError(handle, cudaEventRecord(sent.done, side));
    sent_.push_back(sent);
    bytes_moved_ += data.bytes();
    if (shared_gpu_) {
      DoWaitSend(stream, sent.ticket);
      Settle(stream);
    }
    return sent.ticket;
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override {
    cudaStream_t handle = static_cast<CudaStream&>(stream).handle();
    while (!sent_.empty() && sent_.front().ticket <= ticket) {
      KeepError(handle, cudaStreamWaitEvent(handle, sent_.front().done, 0));
      KeepError(handle, cudaEventDestroy(sent_.front().done));
      sent_.pop_front();
    }
  }
  void DoRecv(Stream& stream, TensorView data, int peer) override {
    CHECK(data.contiguous());
    CHECK(peer == rank_ - 1 && previous_ != nullptr) << "rank " << rank_ << " hears " << peer;
    cudaStream_t handle = Enter(stream);
    previous_->Do("receive", [&](ncclComm_t comm) {
      return nccl_.Recv(data.data, static_cast<size_t>(data.bytes()), ncclUint8, 0, comm, handle);
    });
    bytes_moved_ += data.bytes();
    Leave(stream);
  }

 private:
  struct Sent {
    int64_t ticket = 0;
    cudaEvent_t done = nullptr;
  };

  NcclCommunicator(const NcclApi& nccl, const NcclGroup& group, Device& device,
                   std::unique_ptr<Stream> side_stream)
      : nccl_(nccl),
        device_(device),
        shared_gpu_(group.shared_gpu),
        side_stream_(std::move(side_stream)) {
    if (group.peers != nullptr) peers_.emplace(group.peers, group.peer_way);
    rank_ = group.rank;
    size_ = group.size;
    enqueues_ = true;
    KeepError(static_cast<CudaStream&>(*side_stream_).handle(),
              cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
  }

  absl::Status Join(const std::array<char, 128>& id_bytes, int size, int rank,
                    std::unique_ptr<NcclComm>& out) {
    static_assert(sizeof(ncclUniqueId) == sizeof(id_bytes));
    ncclUniqueId id;
    std::copy(id_bytes.begin(), id_bytes.end(), id.internal);
    ncclComm_t comm = nullptr;
    RETURN_IF_ERROR(
        NcclStatus(nccl_, nccl_.CommInitRank(&comm, size, id, rank), "joining a group"));
    out = std::make_unique<NcclComm>(nccl_, comm);
    return absl::OkStatus();
  }
  // A chain: each pair meets after the pair before it.
  absl::Status JoinNeighbours(const NcclGroup& group) {
    if (rank_ > 0) RETURN_IF_ERROR(Join(group.ids[rank_ - 1].next, 2, 1, previous_));
    if (rank_ + 1 < size_) RETURN_IF_ERROR(Join(group.ids[rank_].next, 2, 0, next_));
    return absl::OkStatus();
  }

  // The stream will report our faults.
  cudaStream_t Watched(Stream& stream) {
    auto& cuda_stream = static_cast<CudaStream&>(stream);
    if (std::find(watched_.begin(), watched_.end(), &cuda_stream) == watched_.end()) {
      watched_.push_back(&cuda_stream);
      cuda_stream.Watch(this, [this] { return Healthy(); });
    }
    if (shared_gpu_) Settle(stream);
    return cuda_stream.handle();
  }
  // Around a call.
  cudaStream_t Enter(Stream& stream) {
    cudaStream_t handle = Watched(stream);
    BeginRecord(calls_, handle);
    return handle;
  }
  void Leave(Stream& stream) {
    EndRecord(calls_, static_cast<CudaStream&>(stream).handle());
    if (shared_gpu_) Settle(stream);
  }

  static cudaEvent_t MarkOn(EnqueuedCalls& calls, cudaStream_t handle) {
    auto event = static_cast<cudaEvent_t>(calls.TakeSpare());
    if (event == nullptr)
      KeepError(handle, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    KeepError(handle, cudaEventRecord(event, handle));
    return event;
  }
  void BeginRecord(EnqueuedCalls& calls, cudaStream_t handle) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    KeepError(handle, cudaStreamIsCapturing(handle, &capturing));
    if (recorder() == nullptr || capturing != cudaStreamCaptureStatusNone) return;
    begin_ = MarkOn(calls, handle);
  }
  void EndRecord(EnqueuedCalls& calls, cudaStream_t handle) {
    if (begin_ == nullptr) return;
    calls.Add(*recorder(), call_, begin_, MarkOn(calls, handle));
    begin_ = nullptr;
  }
  static void Settle(Stream& stream) {
    stream.Synchronize().IgnoreError();  // says so again to who waits for the stream
  }
  // Aborts at the first fault, so that nothing waits for it any longer.
  absl::Status Healthy() {
    const absl::Status status = Poll();
    if (!status.ok()) Abort();
    return status;
  }

  void NcclSum(cudaStream_t handle, TensorView data) {
    if (size_ == 2) {
      all_->Do("all-reduce", [&](ncclComm_t comm) {
        return nccl_.AllReduce(data.data, data.data, static_cast<size_t>(data.elements()),
                               TypeOf(data.dtype), ncclSum, comm, handle);
      });
    } else if (data.bytes() <= kGatherBytes) {
      GatherAndSum(handle, data);
    } else {
      ScatterSumAndGather(handle, data);
    }
  }
  void MeasurePeers(int64_t max_bytes) {
    cudaStream_t side = static_cast<CudaStream&>(*side_stream_).handle();
    peers_->Measure({.stream = side,
                     .sum = [&](TensorView data) { NcclSum(side, data); },
                     .gather = [&](const void* in, void* out,
                                   int64_t bytes) { GatherBytes(side, in, out, bytes); }},
                    max_bytes);
  }

  void GatherBytes(cudaStream_t handle, const void* in, void* out, int64_t bytes) {
    all_->Do("all-gather", [&](ncclComm_t comm) {
      return nccl_.AllGather(in, out, static_cast<size_t>(bytes), ncclUint8, comm, handle);
    });
  }
  // What any sum of up to so many bytes takes: the parts of a small one, or of a large one's piece.
  int64_t ScratchBytes(int64_t max_bytes) const {
    if (size_ == 2) return 0;
    constexpr int64_t kItemBytes = 4;
    const int64_t piece = (max_bytes / size_ + kItemBytes) / kItemBytes * kItemBytes;
    return size_ * std::max(std::min(max_bytes, kGatherBytes), piece);
  }
  absl::Status TakeScratch(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(scratch_.bytes())) return absl::OkStatus();
    ASSIGN_OR_RETURN(scratch_, AllocateForSums(device_, bytes));
    return absl::OkStatus();
  }
  // Grows only for who has not called Reserve, and outside of captures only: a captured step has
  // run before. Graphs that were captured earlier would keep the old address.
  char* Scratch(int64_t bytes) {
    const absl::Status taken = TakeScratch(bytes);
    CHECK(taken.ok()) << taken.ToString();
    return static_cast<char*>(scratch_.data());
  }
  void GatherAndSum(cudaStream_t handle, TensorView data) {
    char* parts = Scratch(data.bytes() * size_);
    GatherBytes(handle, data.data, parts, data.bytes());
    cuda::RankSum(handle, data.dtype, parts, data.elements(), size_, data.elements(), data.data);
  }
  // Rank r sums piece r of all ranks. The last pieces may be short or empty.
  void ScatterSumAndGather(cudaStream_t handle, TensorView data) {
    const int64_t item = static_cast<int64_t>(SizeOf(data.dtype)), n = data.elements();
    const int64_t piece = (n + size_ - 1) / size_;
    const auto begin = [&](int r) { return std::min(n, r * piece); };
    const auto count = [&](int r) { return begin(r + 1) - begin(r); };
    char* parts = Scratch(piece * item * size_);
    char* bytes = data.as<char>();
    const auto exchange = [&](const char* what, auto&& each) {
      all_->Do(what, [&](ncclComm_t comm) {
        nccl_.GroupStart();
        for (int r = 0; r < size_; ++r) each(comm, r);
        return nccl_.GroupEnd();
      });
    };
    exchange("scatter", [&](ncclComm_t comm, int r) {
      nccl_.Send(bytes + begin(r) * item, static_cast<size_t>(count(r) * item), ncclUint8, r, comm,
                 handle);
      nccl_.Recv(parts + r * piece * item, static_cast<size_t>(count(rank_) * item), ncclUint8, r,
                 comm, handle);
    });
    if (count(rank_) > 0) {
      cuda::RankSum(handle, data.dtype, parts, piece, size_, count(rank_),
                    bytes + begin(rank_) * item);
    }
    exchange("gather", [&](ncclComm_t comm, int r) {
      if (r == rank_) return;
      nccl_.Send(bytes + begin(rank_) * item, static_cast<size_t>(count(rank_) * item), ncclUint8,
                 r, comm, handle);
      nccl_.Recv(bytes + begin(r) * item, static_cast<size_t>(count(r) * item), ncclUint8, r, comm,
                 handle);
    });
  }

  const NcclApi& nccl_;
  Device& device_;
  const bool shared_gpu_;
  std::unique_ptr<NcclComm> all_, previous_, next_;
  std::optional<PeerSums> peers_;
  std::unique_ptr<Stream> side_stream_;
  cudaEvent_t ready_ = nullptr;
  std::deque<Sent> sent_;  // oldest first
  int64_t next_ticket_ = 0;
  Buffer scratch_;
  std::vector<CudaStream*> watched_;
  EnqueuedCalls calls_{&Passed},
      side_calls_{&Passed};      // of the callers' stream and of the side stream
  cudaEvent_t begin_ = nullptr;  // of the call that is being made
};

absl::StatusOr<NcclIds> MakeIds() {
  ASSIGN_OR_RETURN(const NcclApi* const nccl, OpenNccl());
  NcclIds ids;
  for (std::array<char, 128>* out : {&ids.group, &ids.next}) {
    ncclUniqueId id;
    RETURN_IF_ERROR(NcclStatus(*nccl, nccl->GetUniqueId(&id), "ncclGetUniqueId"));
    std::copy(std::begin(id.internal), std::end(id.internal), out->begin());
  }
  return ids;
}

}  // namespace
}  // namespace trireme

extern "C" {
#pragma GCC visibility push(default)
void trireme_nccl_ids(absl::StatusOr<trireme::NcclIds>* ids) { *ids = trireme::MakeIds(); }

void trireme_peer_memory(trireme::Device* device,
                         absl::StatusOr<std::unique_ptr<trireme::PeerMemory>>* memory) {
  *memory = trireme::CudaPeerMemory::Create(*device);
}

void trireme_nccl_communicator(
    const trireme::NcclGroup* group, trireme::Device* device,
    absl::StatusOr<std::unique_ptr<trireme::Communicator>>* communicator) {
  *communicator = trireme::NcclCommunicator::Create(*group, *device);
}
#pragma GCC visibility pop
}
