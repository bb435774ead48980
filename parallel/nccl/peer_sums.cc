#include "parallel/nccl/peer_sums.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/stream_errors.h"
#include "kernels/status.h"

namespace trireme {
namespace {

using cuda::PeerPath;

// Sizes that are measured, so far as they occur: from one token's to where NCCL surely wins.
constexpr int64_t kMeasured[] = {4 << 10,   16 << 10,  32 << 10, 64 << 10, 128 << 10,
                                 256 << 10, 512 << 10, 1 << 20,  2 << 20};
constexpr int64_t kGatherBytes = 4096;  // of a rank, in exchanges of what it has found
constexpr DType kTrialType = DType::kBF16;
constexpr int kWarmUps = 3, kCalls = 20, kRounds = 3;
// Ranks enter a trial together, so this is long. One that peers do not answer in is no failure.
constexpr auto kTrialTime = std::chrono::seconds(5);

// Those to measure where sums have up to `max_bytes`.
std::vector<SumTimes> SizesUpTo(int64_t max_bytes) {
  std::vector<SumTimes> sizes;
  for (const int64_t bytes : kMeasured) {
    sizes.push_back({.bytes = bytes});
    if (bytes >= max_bytes) break;
  }
  return sizes;
}

}  // namespace

absl::StatusOr<Buffer> AllocateForSums(Device& device, int64_t bytes) {
  absl::StatusOr<Buffer> buffer = device.Allocate(static_cast<size_t>(bytes));
  if (buffer.ok()) return buffer;
  return absl::Status(buffer.status().code(), absl::StrCat("communicator, for sums between ranks: ",
                                                           std::string(buffer.status().message())));
}

// Clocks of one Measure, in the memory that Reserve has taken.
class PeerSums::Trial {
 public:
  Trial(PeerSums& sums, const Nccl& nccl)
      : sums_(sums),
        nccl_(nccl),
        ranks_(sums.memory_.group().size),
        data_(sums.data_.data()),
        gathered_(sums.gathered_.data()) {
    Keep(cudaEventCreate(&begin_));
    Keep(cudaEventCreate(&end_));
  }
  ~Trial() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  TensorView Data(int64_t bytes) const { return {data_, kTrialType, {bytes / 2}}; }

  // Whether the ways over peers that take so many bytes give NCCL's bits here.
  bool Agrees(int64_t bytes) {
    const std::vector<BF16> expected = Result(bytes, [&] { nccl_.sum(Data(bytes)); });
    for (const PeerPath path : {PeerPath::kOneShot, PeerPath::kTwoShot}) {
      if (!sums_.Fits(path, Data(bytes))) continue;
      const std::vector<BF16> got =
          Result(bytes, [&] { sums_.Sum(nccl_.stream, path, Data(bytes)); });
      if (!std::equal(got.begin(), got.end(), expected.begin(),
                      [](BF16 a, BF16 b) { return a.bits == b.bits; }))
        return false;
    }
    return !sums_.memory_.given_up() && gpu::MayEnqueue(nccl_.stream);
  }

  // Seconds of one of many, the best of some rounds.
  double Seconds(const std::function<void()>& enqueue) const {
    double best = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kWarmUps; ++i) enqueue();
      Keep(cudaEventRecord(begin_, nccl_.stream));
      for (int i = 0; i < kCalls; ++i) enqueue();
      Keep(cudaEventRecord(end_, nccl_.stream));
      Keep(cudaStreamSynchronize(nccl_.stream));
      float ms = 0.0f;
      Keep(cudaEventElapsedTime(&ms, begin_, end_));
      if (!gpu::MayEnqueue(nccl_.stream)) return std::numeric_limits<double>::infinity();
      best = std::min(best, ms / 1e3 / kCalls);
    }
    return best;
  }

  // Each value's largest of all ranks.
  std::vector<double> Slowest(const std::vector<double>& mine) const {
    const auto bytes = static_cast<int64_t>(mine.size() * sizeof(double));
    CHECK_LE(bytes, kGatherBytes);
    Keep(cudaMemcpyAsync(data_, mine.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                         nccl_.stream));
    nccl_.gather(data_, gathered_, bytes);
    std::vector<double> all(mine.size() * ranks_);
    Keep(cudaMemcpyAsync(all.data(), gathered_, all.size() * sizeof(double), cudaMemcpyDeviceToHost,
                         nccl_.stream));
    Keep(cudaStreamSynchronize(nccl_.stream));
    std::vector<double> slowest = mine;
    for (size_t i = 0; i < all.size(); ++i)
      slowest[i % mine.size()] = std::max(slowest[i % mine.size()], all[i]);
    return slowest;
  }

 private:
  // A GPU that is lost says so again to who waits for the step's stream.
  void Keep(cudaError_t error) const { gpu::KeepError(nccl_.stream, error); }
  // Of this rank: no two ranks and no two neighbours alike.
  std::vector<BF16> Values(int64_t bytes) const {
    std::vector<BF16> values(static_cast<size_t>(bytes / 2));
    const int rank = sums_.memory_.group().rank;
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = FromFloat<BF16>(static_cast<float>((i * 37 + rank * 101) % 509) / 16.0f - 15.0f);
    return values;
  }
  std::vector<BF16> Result(int64_t bytes, const std::function<void()>& enqueue) {
    std::vector<BF16> values = Values(bytes);
    Keep(cudaMemcpyAsync(data_, values.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                         nccl_.stream));
    enqueue();
    Wait();
    Keep(cudaMemcpy(values.data(), data_, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
    return values;
  }
  // For what was enqueued; gives up what takes too long, or cannot come to an end.
  void Wait() {
    const auto end = std::chrono::steady_clock::now() + kTrialTime;
    while (cudaStreamQuery(nccl_.stream) == cudaErrorNotReady) {
      if (std::chrono::steady_clock::now() > end) sums_.GiveUp();
      std::this_thread::yield();
    }
    Keep(cudaStreamSynchronize(nccl_.stream));
  }

  PeerSums& sums_;
  const Nccl& nccl_;
  const int ranks_;
  void *const data_, *const gathered_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

absl::Status PeerSums::Reserve(Device& device, int64_t max_bytes) {
  const int64_t bytes =
      std::max(SizesUpTo(max_bytes).back().bytes, kGatherBytes * memory_.group().size);
  ASSIGN_OR_RETURN(data_, AllocateForSums(device, bytes));
  ASSIGN_OR_RETURN(gathered_, AllocateForSums(device, bytes));
  return absl::OkStatus();
}

void PeerSums::Measure(const Nccl& nccl, int64_t max_bytes) {
  CHECK(data_.data() != nullptr) << "sums are measured once memory is reserved";
  limits_ = MeasuredLimits(nccl, max_bytes);
  data_ = Buffer();
  gathered_ = Buffer();
}

SumLimits PeerSums::MeasuredLimits(const Nccl& nccl, int64_t max_bytes) {
  std::vector<SumTimes> times = SizesUpTo(max_bytes);
  Trial trial(*this, nccl);
  bool agrees = true;
  // Each tries both: NCCL's sums are collective, whatever one rank finds.
  for (const SumTimes& t : {times.front(), times.back()}) agrees = trial.Agrees(t.bytes) && agrees;
  if (trial.Slowest({agrees ? 0.0 : 1.0})[0] > 0.0) {
    GiveUp();
    return {};
  }
  if (way_ != PeerWay::kMeasured) {
    constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
    return {.one_shot = way_ == PeerWay::kOneShot ? kAll : 0,
            .two_shot = way_ == PeerWay::kTwoShot ? kAll : 0};
  }
  std::vector<double> seconds;
  for (const SumTimes& t : times) {
    const TensorView data = trial.Data(t.bytes);
    for (const PeerPath path : {PeerPath::kOneShot, PeerPath::kTwoShot}) {
      seconds.push_back(Fits(path, data) ? trial.Seconds([&] { Sum(nccl.stream, path, data); })
                                         : std::numeric_limits<double>::infinity());
    }
    seconds.push_back(trial.Seconds([&] { nccl.sum(data); }));
  }
  const std::vector<double> slowest = trial.Slowest(seconds);
  for (size_t i = 0; i < times.size(); ++i) {
    times[i].one_shot = slowest[3 * i];
    times[i].two_shot = slowest[3 * i + 1];
    times[i].nccl = slowest[3 * i + 2];
  }
  return CrossoverOf(times);
}

bool PeerSums::FitsRows(PeerPath path, DType dtype, const cuda::PeerRows& rows) const {
  const cuda::PeerGroup& group = memory_.group();
  return cuda::PeerBytes(path, dtype, rows, group.size) <= group.half_bytes;
}
bool PeerSums::Fits(PeerPath path, ConstTensorView data) const {
  return FitsRows(path, data.dtype,
                  cuda::RowsOfSum(data.dtype, data.elements(), memory_.group().size));
}

std::optional<PeerPath> PeerSums::Choose(ConstTensorView data, const cuda::PeerRows& rows) const {
  for (const auto& [path, limit] : {std::pair(PeerPath::kOneShot, limits_.one_shot),
                                    std::pair(PeerPath::kTwoShot, limits_.two_shot)}) {
    if (data.bytes() <= limit && FitsRows(path, data.dtype, rows)) return path;
  }
  return std::nullopt;
}
std::optional<PeerPath> PeerSums::PathOf(ConstTensorView data) const {
  return Choose(data, cuda::RowsOfSum(data.dtype, data.elements(), memory_.group().size));
}
std::optional<PeerPath> PeerSums::PathOfNorm(ConstTensorView data) const {
  if (!data.contiguous() || data.elements() == 0) return std::nullopt;
  return Choose(data, cuda::RowsOfNorm(data.dtype, data.dim(0), data.dim(1), memory_.group().size));
}

void PeerSums::Sum(cudaStream_t stream, PeerPath path, TensorView data) const {
  if (!memory_.given_up()) cuda::PeerSum(stream, memory_.group(), path, data);
}
void PeerSums::SumAddNorm(cudaStream_t stream, PeerPath path, TensorView data, TensorView residual,
                          const NormParams& norm, TensorView out) const {
  if (memory_.given_up()) return;
  cuda::PeerSumAddNorm(stream, memory_.group(), path, data, residual, norm, out);
}

int64_t PeerSums::MovedBytes(PeerPath path, int64_t bytes) const {
  const int64_t others = memory_.group().size - 1;
  return path == PeerPath::kOneShot ? 2 * others * bytes : 4 * others * bytes / (others + 1);
}

}  // namespace trireme
