#include "parallel/mpi_communicator.h"

#include <mpi.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "parallel/mpi_check.h"
#include "parallel/rank_sum.h"
#include "parallel/send_queue.h"
#include "parallel/shared_window.h"
#include "parallel/topology.h"

namespace trireme {
namespace {

// Between hosts, up to this many bytes AllReduceSum lets every rank gather and sum everything (one
// collective); above it each rank sums one piece and the pieces are gathered (two collectives, 2 /
// size of the traffic). Two eager messages of 4 KiB a rank cost about as much as one collective's
// latency. (By messages on one host, 2 ranks: 8 KiB 5.5 us whole, 9.4 in pieces; 16 KiB 14.2
// whole, 11.0 in pieces.)
constexpr int64_t kDirectBytes = 8192;

int IntCount(int64_t bytes) {
  CHECK_LE(bytes, int64_t{INT_MAX}) << "message too long for MPI";
  return static_cast<int>(bytes);
}

// The group's world ranks, which every cut of ours makes evenly spaced.
CommGroup GroupOf(MPI_Comm comm, const char* name) {
  MPI_Group world = MPI_GROUP_NULL, group = MPI_GROUP_NULL;
  MPI_CHECK(MPI_Comm_group(MPI_COMM_WORLD, &world));
  MPI_CHECK(MPI_Comm_group(comm, &group));
  CommGroup out;
  MPI_CHECK(MPI_Group_size(group, &out.size));
  std::vector<int> indices(out.size), ranks(out.size);
  std::iota(indices.begin(), indices.end(), 0);
  MPI_CHECK(MPI_Group_translate_ranks(group, out.size, indices.data(), world, ranks.data()));
  MPI_CHECK(MPI_Group_free(&group));
  MPI_CHECK(MPI_Group_free(&world));
  std::strncpy(out.name.data(), name, out.name.size() - 1);
  out.first = ranks[0];
  if (out.size > 1) out.stride = ranks[1] - ranks[0];
  for (int i = 0; i < out.size; ++i) CHECK_EQ(ranks[i], out.RankOf(i)) << "of group " << name;
  return out;
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MPI_Comm comm, FlightRecorder* recorder, const MpiCommunicatorOptions& options)
      : comm_(comm), options_(options) {
    sends_.emplace(MPI_Comm_c2f(comm));
    MPI_CHECK(MPI_Comm_rank(comm, &rank_));
    MPI_CHECK(MPI_Comm_size(comm, &size_));
    RecordWith(recorder, GroupOf(comm, options.name));
  }
  ~MpiCommunicator() override;
  // For messages; where there is a window, which only all ranks together know, they are given back.
  absl::Status Reserve(int64_t max_bytes) override {
    if (window_ != nullptr) return absl::OkStatus();
    return TakeScratch(MpiCommunicatorBytes(size_, max_bytes, /*spans_hosts=*/true));
  }
  void ChooseSums(int64_t /*max_bytes*/) override {
    if (Window() != nullptr) scratch_.reset(), scratch_bytes_ = 0;
  }
  int64_t buffer_bytes() const override {
    return window_ != nullptr ? SharedWindow::BytesOfRank() : scratch_bytes_;
  }
  bool spans_hosts() const override { return window_tried_ && window_ == nullptr; }

 private:
  void CheckStream(Stream& stream) const;
  void DoAllReduceSum(Stream& stream, TensorView data) override;
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override;
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override;
  void DoWaitSend(Stream& stream, int64_t ticket) override;
  void DoRecv(Stream& stream, TensorView data, int peer) override;

  void GatherAndSum(TensorView data);
  void ReduceScatterAndGather(TensorView data);
  absl::Status TakeScratch(int64_t bytes);
  char* Scratch(int64_t bytes);
  // Made by the first collective, so that a group that only sends and receives needs no shared
  // memory.
  SharedWindow* Window();

  MPI_Comm comm_;
  const MpiCommunicatorOptions options_;
  std::unique_ptr<SharedWindow> window_;
  bool window_tried_ = false;
  std::unique_ptr<char[]> scratch_;
  int64_t scratch_bytes_ = 0;
  std::vector<const void*> inputs_;
  struct {
    std::vector<int> sizes, offsets, in_sizes, in_offsets;  // by rank
  } pieces_;
  std::optional<SendQueue> sends_;
};

void MpiCommunicator::CheckStream(Stream& stream) const {
  CHECK(options_.any_stream || stream.device().spec().host_memory)
      << "MPI moves host memory only; device " << stream.device().spec().name;
}

MpiCommunicator::~MpiCommunicator() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  CHECK(!finalized) << "a communicator outlived the control plane";
  const FlightRecorder::Scope scope = RecordFree();
  sends_.reset();
  window_.reset();
  MPI_Comm_free(&comm_);
}

SharedWindow* MpiCommunicator::Window() {
  if (!window_tried_ && options_.use_shared_memory)
    window_ = SharedWindow::Create(MPI_Comm_c2f(comm_));
  window_tried_ = true;
  return window_.get();
}

absl::Status MpiCommunicator::TakeScratch(int64_t bytes) {
  if (scratch_bytes_ >= bytes) return absl::OkStatus();
  std::unique_ptr<char[]> memory(new (std::nothrow) char[static_cast<size_t>(bytes)]);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("communicator ", group().name.data(), ": the host has no memory for ", bytes,
                     " bytes of sums between ranks: lower --max-num-batched-tokens"));
  }
  scratch_ = std::move(memory);
  scratch_bytes_ = bytes;
  return absl::OkStatus();
}

// Grows only for who has not called Reserve.
char* MpiCommunicator::Scratch(int64_t bytes) {
  const absl::Status taken = TakeScratch(bytes);
  CHECK(taken.ok()) << taken.ToString();
  return scratch_.get();
}

void MpiCommunicator::DoAllReduceSum(Stream& stream, TensorView data) {
  CheckStream(stream);
  CHECK(data.contiguous());
  CHECK(IsFloat(data.dtype)) << Name(data.dtype);
  if (data.elements() == 0) return;
  if (SharedWindow* window = Window()) {
    window->AllReduceSum(data.dtype, data.elements(), data.data);
    bytes_moved_ += 4 * data.bytes() * (size_ - 1) / size_;
  } else if (data.bytes() <= kDirectBytes) {
    GatherAndSum(data);
  } else {
    ReduceScatterAndGather(data);
  }
}

void MpiCommunicator::GatherAndSum(TensorView data) {
  const int bytes = IntCount(data.bytes());
  char* all = Scratch(int64_t{bytes} * size_);
  MPI_CHECK(MPI_Allgather(data.data, bytes, MPI_BYTE, all, bytes, MPI_BYTE, comm_));
  inputs_.clear();
  for (int r = 0; r < size_; ++r) inputs_.push_back(all + int64_t{bytes} * r);
  SumInOrder(data.dtype, inputs_, data.elements(), data.data);
  bytes_moved_ += 2 * (size_ - 1) * int64_t{bytes};
}

void MpiCommunicator::ReduceScatterAndGather(TensorView data) {
  const int64_t item = static_cast<int64_t>(SizeOf(data.dtype));
  auto& [sizes, offsets, in_sizes, in_offsets] = pieces_;
  for (std::vector<int>* of_rank : {&sizes, &offsets, &in_sizes, &in_offsets})
    of_rank->resize(size_);
  const Range mine = PieceOf(data.elements(), size_, rank_);
  const int64_t piece_bytes = mine.size() * item;
  char* pieces = Scratch(piece_bytes * size_);
  inputs_.clear();
  for (int r = 0; r < size_; ++r) {
    const Range range = PieceOf(data.elements(), size_, r);
    sizes[r] = IntCount(range.size() * item);
    offsets[r] = IntCount(range.begin * item);
    in_sizes[r] = IntCount(piece_bytes);
    in_offsets[r] = IntCount(piece_bytes * r);
    inputs_.push_back(pieces + in_offsets[r]);
  }
  MPI_CHECK(MPI_Alltoallv(data.data, sizes.data(), offsets.data(), MPI_BYTE, pieces,
                          in_sizes.data(), in_offsets.data(), MPI_BYTE, comm_));
  SumInOrder(data.dtype, inputs_, mine.size(), data.as<char>() + offsets[rank_]);
  MPI_CHECK(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, data.data, sizes.data(),
                           offsets.data(), MPI_BYTE, comm_));
  // Out: the others' pieces, then this rank's sum to each of them; in: the same the other way
  // round.
  bytes_moved_ += 2 * (data.bytes() - piece_bytes) + 2 * (size_ - 1) * piece_bytes;
}

void MpiCommunicator::DoAllGather(Stream& stream, ConstTensorView in, TensorView out) {
  CheckStream(stream);
  CHECK(in.contiguous() && out.contiguous());
  CHECK_EQ(in.bytes() * size_, out.bytes());
  const int bytes = IntCount(in.bytes());
  if (bytes == 0) return;
  bytes_moved_ += 2 * (size_ - 1) * int64_t{bytes};
  if (SharedWindow* window = Window()) return window->AllGather(in.data, bytes, out.data);
  const bool in_place = in.data == out.as<char>() + int64_t{bytes} * rank_;
  MPI_CHECK(MPI_Allgather(in_place ? MPI_IN_PLACE : in.data, bytes, MPI_BYTE, out.data, bytes,
                          MPI_BYTE, comm_));
}

int64_t MpiCommunicator::DoSend(Stream& stream, ConstTensorView data, int peer) {
  CheckStream(stream);
  CHECK(data.contiguous());
  CHECK(peer >= 0 && peer < size_ && peer != rank_) << "peer " << peer;
  bytes_moved_ += data.bytes();
  return sends_->Send(data.data, IntCount(data.bytes()), peer);
}

void MpiCommunicator::DoWaitSend(Stream& stream, int64_t ticket) {
  CheckStream(stream);
  sends_->Wait(ticket);
}

void MpiCommunicator::DoRecv(Stream& stream, TensorView data, int peer) {
  CheckStream(stream);
  CHECK(data.contiguous());
  CHECK(peer >= 0 && peer < size_ && peer != rank_) << "peer " << peer;
  MPI_Status status;
  MPI_CHECK(MPI_Recv(data.data, IntCount(data.bytes()), MPI_BYTE, peer, /*tag=*/0, comm_, &status));
  int count = 0;
  MPI_CHECK(MPI_Get_count(&status, MPI_BYTE, &count));
  CHECK_EQ(int64_t{count}, data.bytes()) << "sent by rank " << peer << " of the group";
  bytes_moved_ += count;
}

}  // namespace

int64_t MpiCommunicatorBytes(int size, int64_t max_bytes, bool spans_hosts) {
  if (size == 1) return 0;
  if (!spans_hosts) return SharedWindow::BytesOfRank();
  // Every rank's whole input, or its part of this rank's piece, which begins at whole items.
  constexpr int64_t kItemBytes = 4;
  const int64_t piece = (max_bytes / size + kItemBytes) / kItemBytes * kItemBytes;
  return size * std::max(std::min(max_bytes, kDirectBytes), piece);
}

std::unique_ptr<Communicator> NewMpiCommunicator(const ControlPlane& control, int color,
                                                 const MpiCommunicatorOptions& options) {
  const FlightRecorder::Scope scope(control.recorder(), CommOp::kSplit, 0, 0);
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_CHECK(MPI_Comm_split(MPI_COMM_WORLD, color, control.rank(), &comm));
  int size = 0;
  MPI_CHECK(MPI_Comm_size(comm, &size));
  if (size == 1) {
    MPI_CHECK(MPI_Comm_free(&comm));
    return NewSelfCommunicator();
  }
  return std::make_unique<MpiCommunicator>(comm, control.recorder(), options);
}

}  // namespace trireme
