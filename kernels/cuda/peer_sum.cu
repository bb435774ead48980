#include <algorithm>

#include "kernels/cuda/norm_row.cuh"
#include "kernels/cuda/peer_sum.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {
namespace {

constexpr int64_t kLoadBytes = 16;
// Below, more blocks would have nothing to send: 128 threads of a load each.
constexpr int64_t kLeastRowBytes = 128 * kLoadBytes;
// A wait looks at the host's memory, which is far, this seldom: about every millisecond.
constexpr unsigned kSpinsPerLook = 1024;

int64_t RoundedUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What is done with a row's sum.
enum class Then : uint8_t { kStore, kAddRmsNorm, kAddLayerNorm };

template <typename T>
struct NormTask {
  T* residual;
  int64_t residual_stride;
  NormWeights<T> weights;
  T* out;
  int64_t out_stride;
};

template <typename T>
struct Task {
  T* data;
  int64_t elements;
  int rows, width, piece;
  NormTask<T> norm;
};

// Where rank `at` hears that the block of rank `from` with this block's number has come to a
// meeting.
__device__ inline uint64_t* FlagOf(const PeerGroup& group, int at, int meeting, int from) {
  auto* flags = reinterpret_cast<uint64_t*>(group.memory[at]);
  return flags + (meeting * kMaxPeers + from) * kMaxPeerBlocks + blockIdx.x;
}

// What the blocks of this number wrote into each other's memory is there for all of them.
__device__ inline void Meet(const PeerGroup& group, int meeting, uint64_t launch) {
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer < group.size && peer != group.rank) {
    gpu::StoreFlag(FlagOf(group, peer, meeting, group.rank), launch);
    const uint64_t* heard = FlagOf(group, group.rank, meeting, peer);
    for (unsigned spins = 1; gpu::LoadFlag(heard) < launch; ++spins) {
      if (spins % kSpinsPerLook == 0 && group.given_up != nullptr &&
          gpu::LoadRelaxed(group.given_up) != 0)
        break;
      gpu::SpinPause();
    }
  }
  __syncthreads();
}

// A launch's share of rank `at`'s memory.
template <typename T>
__device__ inline T* Exchange(const PeerGroup& group, int at, uint64_t launch) {
  return reinterpret_cast<T*>(group.memory[at] + kPeerFlagBytes +
                              static_cast<int64_t>(launch & 1) * group.half_bytes);
}

// The V elements of `own` and of the others' slots, `stride` apart, in rank order.
template <typename T, int V>
__device__ inline void SumSlots(const PeerGroup& group, const T* own, const T* slots,
                                int64_t stride, float (&sum)[V]) {
  LoadFloats<V>(group.rank == 0 ? own : slots, sum);
  float x[V];
  for (int rank = 1; rank < group.size; ++rank) {
    LoadFloats<V>(rank == group.rank ? own : slots + rank * stride, x);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = __fadd_rn(sum[v], x[v]);
  }
}

// Launch `launch` of this rank's `task`: rows of the block, to all others or each piece to its
// rank.
template <typename T, int V, bool kTwoShot>
__device__ inline void SendParts(const PeerGroup& group, const Task<T>& task, uint64_t launch) {
  const int64_t slot = int64_t{task.rows} * (kTwoShot ? task.piece : task.width);
  for (int row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const int64_t begin = int64_t{row} * task.width;
    const int length = static_cast<int>(min(int64_t{task.width}, task.elements - begin));
    for (int i = threadIdx.x * V; i < length; i += blockDim.x * V) {
      const auto part = *reinterpret_cast<const Pack<T, V>*>(task.data + begin + i);
      const auto send = [&](int peer, int64_t at) {
        T* to = Exchange<T>(group, peer, launch) + group.rank * slot + at;
        *reinterpret_cast<Pack<T, V>*>(to) = part;
      };
      if constexpr (kTwoShot) {
        const int peer = i / task.piece;
        if (peer != group.rank) send(peer, int64_t{row} * task.piece + (i - peer * task.piece));
      } else {
        for (int ahead = 1; ahead < group.size; ++ahead) {  // not all to the same rank at once
          const int peer = group.rank + ahead;
          send(peer < group.size ? peer : peer - group.size, begin + i);
        }
      }
    }
  }
}

// Sums this rank's piece of the block's rows and sends it to all, itself among them.
template <typename T, int V>
__device__ inline void SumPieces(const PeerGroup& group, const Task<T>& task, uint64_t launch) {
  const int64_t slot = int64_t{task.rows} * task.piece;
  const T* slots = Exchange<T>(group, group.rank, launch);
  for (int row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const int64_t begin = int64_t{row} * task.width + group.rank * task.piece;
    const int length = static_cast<int>(
        min(int64_t{min(task.piece, task.width - group.rank * task.piece)}, task.elements - begin));
    for (int i = threadIdx.x * V; i < length; i += blockDim.x * V) {
      float sum[V];
      SumSlots<T, V>(group, task.data + begin + i, slots + int64_t{row} * task.piece + i, slot,
                     sum);
      for (int peer = 0; peer < group.size; ++peer)
        StoreRounded<V>(Exchange<T>(group, peer, launch) + group.size * slot + begin + i, sum);
    }
  }
}

// In each block: send the parts, meet, and finish rows with the sums, which in two-shot are
// exchanged in between.
template <typename T, int V, bool kTwoShot, Then kThen>
__global__ void SumOverPeers(const __grid_constant__ PeerGroup group,
                             const __grid_constant__ Task<T> task) {
  gpu::WaitForPrevious();
  // Every launch adds kMaxPeerBlocks, whatever its blocks, each of them after it has been here.
  const uint64_t launch = gpu::LoadRelaxed(group.launched) / kMaxPeerBlocks + 1;
  SendParts<T, V, kTwoShot>(group, task, launch);
  Meet(group, 0, launch);
  const T* mine = Exchange<T>(group, group.rank, launch);
  if constexpr (kTwoShot) {
    SumPieces<T, V>(group, task, launch);
    Meet(group, 1, launch);
    mine += int64_t{group.size} * task.rows * task.piece;
  }
  const int64_t slot = int64_t{task.rows} * task.width;
  for (int row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const int64_t begin = int64_t{row} * task.width;
    const auto sum = [&](int i, float(&out)[V]) {
      if constexpr (kTwoShot) {
        LoadFloats<V>(mine + begin + i, out);
      } else {
        SumSlots<T, V>(group, task.data + begin + i, mine + begin + i, slot, out);
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = Float(Rounded<T>(out[v]));
      }
    };
    if constexpr (kThen != Then::kStore) {
      constexpr NormKind kKind = kThen == Then::kAddLayerNorm ? NormKind::kLayer : NormKind::kRms;
      const NormTask<T>& norm = task.norm;
      if (row != static_cast<int>(blockIdx.x)) __syncthreads();
      NormRow<T, V, kKind, true>(norm.residual + row * norm.residual_stride, sum, norm.weights,
                                 norm.out + row * norm.out_stride, task.width);
    } else {
      const int length = static_cast<int>(min(int64_t{task.width}, task.elements - begin));
      float out[V];
      for (int i = threadIdx.x * V; i < length; i += blockDim.x * V) {
        sum(i, out);
        StoreRounded<V>(task.data + begin + i, out);
      }
    }
  }
  if (threadIdx.x == 0)
    gpu::AddRelaxed(group.launched, blockIdx.x == 0 ? kMaxPeerBlocks - gridDim.x + 1 : 1);
}

template <typename T, int V, Then kThen>
void Enqueue(gpu::StreamHandle stream, const PeerGroup& group, PeerPath path, const Task<T>& task) {
  const int64_t longest = std::min(int64_t{task.width}, task.elements);
  const gpu::Config config{dim3(static_cast<unsigned>(std::min(task.rows, kMaxPeerBlocks))),
                           dim3(RowThreads(longest, V)), 0, stream};
  if (path == PeerPath::kTwoShot) {
    gpu::LaunchResident(config, SumOverPeers<T, V, true, kThen>, group, task);
  } else {
    gpu::LaunchResident(config, SumOverPeers<T, V, false, kThen>, group, task);
  }
}

template <typename T>
Task<T> TaskOf(const TensorView& data, const PeerRows& rows) {
  return {.data = static_cast<T*>(data.data),
          .elements = data.elements(),
          .rows = static_cast<int>(rows.rows),
          .width = static_cast<int>(rows.width),
          .piece = static_cast<int>(rows.piece),
          .norm = {}};
}

void CheckSum(const PeerGroup& group, PeerPath path, const TensorView& data, const PeerRows& rows) {
  CHECK(group.size >= 1 && group.size <= kMaxPeers) << group.size << " ranks";
  CHECK(data.contiguous() && IsFloat(data.dtype));
  CHECK_LE(PeerBytes(path, data.dtype, rows, group.size), group.half_bytes);
}

PeerRows Cut(DType dtype, int64_t rows, int64_t width, int ranks) {
  const int64_t unit = kLoadBytes / static_cast<int64_t>(SizeOf(dtype));
  return {rows, width, RoundedUp((width + ranks - 1) / ranks, unit)};
}

}  // namespace

PeerRows RowsOfSum(DType dtype, int64_t elements, int ranks) {
  const int64_t item = static_cast<int64_t>(SizeOf(dtype));
  const int64_t share = (elements + kMaxPeerBlocks - 1) / kMaxPeerBlocks;
  const int64_t width = RoundedUp(std::max(share, kLeastRowBytes / item), kLoadBytes / item);
  return Cut(dtype, (elements + width - 1) / width, width, ranks);
}

PeerRows RowsOfNorm(DType dtype, int64_t rows, int64_t width, int ranks) {
  return Cut(dtype, rows, width, ranks);
}

int64_t PeerBytes(PeerPath path, DType dtype, const PeerRows& r, int ranks) {
  const int64_t elements = path == PeerPath::kOneShot ? ranks * r.rows * r.width
                                                      : ranks * r.rows * r.piece + r.rows * r.width;
  return elements * static_cast<int64_t>(SizeOf(dtype));
}

void PeerSum(gpu::StreamHandle stream, const PeerGroup& group, PeerPath path, TensorView data) {
  const int64_t elements = data.elements();
  if (elements == 0) return;
  const PeerRows rows = RowsOfSum(data.dtype, elements, group.size);
  CheckSum(group, path, data, rows);
  const TensorView flat(data.data, data.dtype, {elements});
  DispatchFloat(data.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(flat), [&](auto v) {
      Enqueue<T, v(), Then::kStore>(stream, group, path, TaskOf<T>(data, rows));
    });
  });
}

void PeerSumAddNorm(gpu::StreamHandle stream, const PeerGroup& group, PeerPath path,
                    TensorView data, TensorView residual, const NormParams& norm, TensorView out) {
  if (data.elements() == 0) return;
  const PeerRows rows = RowsOfNorm(data.dtype, data.dim(0), data.dim(1), group.size);
  CheckSum(group, path, data, rows);
  // As AddNorm has it, for its bits.
  const bool vector =
      Vectorizable(residual) && Vectorizable(norm) && Vectorizable(out) && Vectorizable(data);
  DispatchFloat(data.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(vector, [&](auto v) {
      Task<T> task = TaskOf<T>(data, rows);
      task.norm = {.residual = static_cast<T*>(residual.data),
                   .residual_stride = residual.stride0,
                   .weights = WeightsOf<T>(norm),
                   .out = static_cast<T*>(out.data),
                   .out_stride = out.stride0};
      if (norm.kind == NormKind::kLayer) {
        Enqueue<T, v(), Then::kAddLayerNorm>(stream, group, path, task);
      } else {
        Enqueue<T, v(), Then::kAddRmsNorm>(stream, group, path, task);
      }
    });
  });
}

}  // namespace trireme::cuda
