// What lies between the two stages of a MoL search, without the host: where the lists of all ranks
// end, and which of this shard's slots are on them. Slots of a query are gathered as bits of a map,
// which sorts them and drops those that several lists have; then the bits are counted and written
// out. The map takes an eighth of a byte a slot and query, as a filter's mask does.
#include "kernels/cuda/mol_candidates.cuh"
#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/radix_select.cuh"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A block a list.
__global__ void __launch_bounds__(kThreads)
    FindLast(const uint64_t* keys, int ranks, int k, uint64_t* last) {
  const int64_t list = blockIdx.x, lists = gridDim.x;
  int rank = k;
  const uint64_t found = SelectLargest<kThreads>(
      ranks * k, [=](int i) { return keys[(i / k * lists + list) * k + i % k]; }, rank);
  if (threadIdx.x == 0) last[list] = found;
}

// One rank's list is sorted.
__global__ void CopyLast(const uint64_t* keys, int64_t lists, int k, uint64_t* last) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < lists) last[i] = keys[i * k + k - 1];
}

__global__ void ClearMaps(uint32_t* maps, int64_t words) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < words) maps[i] = 0;
}

// A thread a place of a list.
__global__ void MarkSlots(const uint64_t* keys, const int32_t* slots, const uint64_t* last,
                          int64_t places, int k, int lists_a_query, int64_t words_a_query,
                          uint32_t* maps) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= places) return;
  const int64_t list = i / k;
  if (keys[i] == 0 || keys[i] < last[list]) return;
  uint32_t* map = maps + list / lists_a_query * words_a_query;
  atomicOr(map + slots[i] / 32, 1u << (slots[i] % 32));
}

// The part of a query's map that is this block's.
struct MapPart {
  __device__ explicit MapPart(const MolMaps& maps)
      : begin(blockIdx.x % maps.parts * kMolMapWords),
        end(min(begin + kMolMapWords, maps.words)),
        words(maps.bits + blockIdx.x / maps.parts * maps.words) {}
  int64_t begin, end;
  const uint32_t* words;
};

__global__ void __launch_bounds__(kThreads) CountSlots(MolMaps maps) {
  GPU_SHARED(sum, int);
  const MapPart part(maps);
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  int own = 0;
  for (int64_t w = part.begin + threadIdx.x; w < part.end; w += kThreads) {
    own += __popc(part.words[w]);
  }
  own = gpu::WarpSum(own);
  if (gpu::LaneId() == 0) atomicAdd(&sum, own);
  __syncthreads();
  if (threadIdx.x == 0) maps.counts[blockIdx.x] = sum;
}

// `own` of all threads before this one; `total` becomes that of all. All threads call it.
__device__ inline int BlockPrefix(int own, int& total) {
  GPU_SHARED(warps, int[kWarps]);
  const int lane = gpu::LaneId(), warp = static_cast<int>(threadIdx.x) / 32;
  int sum = own;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, o);
    if (lane >= o) sum += below;
  }
  __syncthreads();  // all are done with the call before
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = sum - own;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before;
}

// One block: counts become places in the list of all; where each query's begin.
__global__ void __launch_bounds__(kThreads) PlaceSlots(MolMaps maps, int batch, int32_t* begin) {
  const int64_t parts = int64_t{batch} * maps.parts;
  int base = 0;
  for (int64_t first = 0; first < parts; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int total;
    const int place = base + BlockPrefix(i < parts ? maps.counts[i] : 0, total);
    if (i < parts) {
      maps.counts[i] = place;
      if (i % maps.parts == 0) begin[i / maps.parts] = place;
    }
    base += total;
  }
  if (threadIdx.x == 0) begin[batch] = base;
}

__global__ void __launch_bounds__(kThreads) WriteSlots(MolMaps maps, int32_t* candidates) {
  const MapPart part(maps);
  int32_t* out = candidates + maps.counts[blockIdx.x];
  for (int64_t first = part.begin; first < part.end; first += kThreads) {
    const int64_t w = first + threadIdx.x;
    const uint32_t word = w < part.end ? part.words[w] : 0;
    int total;
    int at = BlockPrefix(__popc(word), total);
    for (uint32_t left = word; left != 0; left &= left - 1) {
      out[at++] = static_cast<int32_t>(w) * 32 + __ffs(static_cast<int>(left)) - 1;
    }
    out += total;
  }
}

}  // namespace

void MolLastKeys(Stream& stream, ConstTensorView keys, TensorView last) {
  const int64_t lists = last.dim(0);
  const int k = static_cast<int>(keys.dim(1)), ranks = static_cast<int>(keys.dim(0) / lists);
  const gpu::StreamHandle handle = NativeHandle(stream);
  if (ranks == 1) {
    gpu::Launch({dim3(Blocks(lists, kThreads)), dim3(kThreads), 0, handle}, CopyLast,
                keys.as<uint64_t>(), lists, k, last.as<uint64_t>());
    return;
  }
  gpu::Launch({dim3(static_cast<unsigned>(lists)), dim3(kThreads), 0, handle}, FindLast,
              keys.as<uint64_t>(), ranks, k, last.as<uint64_t>());
}

void MolCandidates(Stream& stream, std::span<const MolStage> stages, int64_t slots,
                   TensorView begin, TensorView candidates, TensorView workspace) {
  const int64_t batch = begin.dim(0) - 1;
  Workspace memory(workspace.data);
  const MolMaps maps(memory, batch, slots);
  const gpu::StreamHandle handle = NativeHandle(stream);
  const int64_t words = batch * maps.words;
  if (words > 0) {
    gpu::Launch({dim3(Blocks(words, kThreads)), dim3(kThreads), 0, handle}, ClearMaps, maps.bits,
                words);
  }
  for (const MolStage& stage : stages) {
    const int64_t places = stage.found.keys.elements();
    gpu::Launch({dim3(Blocks(places, kThreads)), dim3(kThreads), 0, handle}, MarkSlots,
                stage.found.keys.as<uint64_t>(), stage.found.slots.as<int32_t>(),
                stage.last.as<uint64_t>(), places, static_cast<int>(stage.found.keys.dim(1)),
                static_cast<int>(stage.last.dim(0) / batch), maps.words, maps.bits);
  }
  const auto parts = static_cast<unsigned>(batch * maps.parts);
  if (parts > 0) gpu::Launch({dim3(parts), dim3(kThreads), 0, handle}, CountSlots, maps);
  gpu::Launch({dim3(1), dim3(kThreads), 0, handle}, PlaceSlots, maps, static_cast<int>(batch),
              begin.as<int32_t>());
  if (parts > 0) {
    gpu::Launch({dim3(parts), dim3(kThreads), 0, handle}, WriteSlots, maps,
                candidates.as<int32_t>());
  }
}

}  // namespace trireme::cuda
