// Cutting lists back to their k largest (radix_select.cuh), and sorting them at the end: chunks in
// shared memory (bitonic; Batcher 1968), then merges in which every element finds its place by a
// binary search in the other half.
#include "kernels/cuda/mol_topk.cuh"
#include "kernels/cuda/radix_select.cuh"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 2048;
// Keys that all lists together may take in a piece, in the worst case: 96 MiB.
constexpr int64_t kPieceKeys = int64_t{1} << 23;

__global__ void ClearLists(MolLists lists, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  lists.counts[i] = 0;
  lists.thresholds[i] = 0;
}

// A block a list: its k largest keys move to the front. Lists with room for another piece wait.
__global__ void __launch_bounds__(kThreads)
    CutLists(MolLists lists, int k, bool last, int32_t* all_holes) {
  GPU_SHARED(holes_found, int);
  GPU_SHARED(moved, int);
  const int64_t list = blockIdx.x;
  uint64_t* keys = lists.keys + list * lists.capacity;
  int32_t* slots = lists.slots + list * lists.capacity;
  int32_t* holes = all_holes + list * k;
  const int n = lists.counts[list];
  if (n <= k || (n < 2 * k && !last)) return;
  if (threadIdx.x == 0) holes_found = moved = 0;  // seen by all after the select's barriers
  int rank = k;
  const uint64_t least = SelectLargest<kThreads>(
      n, [keys](int i) { return keys[i]; }, rank);
  for (int i = threadIdx.x; i < k; i += kThreads) {
    if (keys[i] < least) holes[atomicAdd(&holes_found, 1)] = i;
  }
  __syncthreads();
  for (int i = k + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    if (keys[i] < least) continue;
    const int to = holes[atomicAdd(&moved, 1)];
    keys[to] = keys[i];
    slots[to] = slots[i];
  }
  if (threadIdx.x == 0) {
    lists.counts[list] = k;
    lists.thresholds[list] = least;
  }
}

struct Entry {
  uint64_t key;
  int32_t slot;
};

// A block a chunk of a list: sorted, largest first; what is not there is key 0, slot -1. `size`: a
// power of two, at least the chunk's share of k.
__global__ void __launch_bounds__(kThreads)
    SortChunks(MolLists lists, int k, int chunks, int size, uint64_t* to_keys, int32_t* to_slots) {
  GPU_SHARED(keys, uint64_t[kChunk]);
  GPU_SHARED(slots, int32_t[kChunk]);
  const int64_t list = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kChunk;
  const int n = min(lists.counts[list], k);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const bool there = first + i < n;
    keys[i] = there ? lists.keys[list * lists.capacity + first + i] : 0;
    slots[i] = there ? lists.slots[list * lists.capacity + first + i] : -1;
  }
  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - i % stride, high = low + stride;
        const bool descending = (low & width) == 0;
        if ((keys[low] < keys[high]) != descending) continue;
        const Entry entry{keys[low], slots[low]};
        keys[low] = keys[high];
        slots[low] = slots[high];
        keys[high] = entry.key;
        slots[high] = entry.slot;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size && first + i < k; i += kThreads) {
    to_keys[list * k + first + i] = keys[i];
    to_slots[list * k + first + i] = slots[i];
  }
}

// How many of the n keys, largest first, come before `key`: the larger ones, and equal ones too (of
// unused places) where `equal_before`.
__device__ inline int Before(const uint64_t* keys, int n, uint64_t key, bool equal_before) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (keys[middle] > key || (equal_before && keys[middle] == key)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Merges neighbouring sorted runs of a list's k places; a thread a place.
__global__ void MergeRuns(const uint64_t* keys, const int32_t* slots, uint64_t* to_keys,
                          int32_t* to_slots, int k, int run, int blocks_a_list) {
  const int64_t list = blockIdx.x / blocks_a_list;
  const int i = static_cast<int>(blockIdx.x % blocks_a_list) * kThreads + threadIdx.x;
  if (i >= k) return;
  keys += list * k;
  const int own = i / run * run, other = (i / run ^ 1) * run;
  const int others = max(0, min(k - other, run));
  const uint64_t key = keys[i];
  const bool second = own > other;
  const int ahead = others > 0 ? Before(keys + other, others, key, second) : 0;
  const int64_t to = list * k + min(own, other) + (i - own) + ahead;
  to_keys[to] = key;
  to_slots[to] = slots[list * k + i];
}

int64_t LongestPiece(int64_t lists, int64_t items) {
  const int64_t most = std::max<int64_t>(1024, kPieceKeys / std::max<int64_t>(1, lists));
  return std::min(most, std::max<int64_t>(items, kMolBlockRows)) / kMolBlockRows * kMolBlockRows;
}

}  // namespace

MolTopKMemory::MolTopKMemory(Workspace& workspace, int64_t lists_in, int64_t k_in, int64_t items_in)
    : lists(lists_in), k(k_in), items(items_in), longest(LongestPiece(lists, items)) {
  const int64_t capacity = std::min(2 * k + longest, items), merged = k > kChunk ? lists * k : 0;
  view.keys = workspace.Take<uint64_t>(lists * capacity);
  view.slots = workspace.Take<int32_t>(lists * capacity);
  view.counts = workspace.Take<int>(lists);
  view.thresholds = workspace.Take<uint64_t>(lists);
  view.capacity = capacity;
  holes = workspace.Take<int32_t>(lists * k);
  spare_keys = workspace.Take<uint64_t>(merged);
  spare_slots = workspace.Take<int32_t>(merged);
}

MolTopKScan::MolTopKScan(Stream& stream, const MolTopKMemory& memory)
    : stream_(stream), memory_(memory) {
  if (memory_.lists == 0) return;
  gpu::Launch({dim3(Blocks(memory_.lists, kThreads)), dim3(kThreads), 0, NativeHandle(stream)},
              ClearLists, memory_.view, memory_.lists);
}

void MolTopKScan::Cut(bool last) {
  if (memory_.lists == 0) return;
  gpu::Launch(
      {dim3(static_cast<unsigned>(memory_.lists)), dim3(kThreads), 0, NativeHandle(stream_)},
      CutLists, memory_.view, static_cast<int>(memory_.k), last, memory_.holes);
}

void MolTopKScan::Write(const MolTopK& out) {
  const int64_t lists = memory_.lists;
  if (lists == 0) return;
  const int k = static_cast<int>(memory_.k);
  const int chunks = (k + kChunk - 1) / kChunk;
  int size = 2;
  while (size < std::min(k, kChunk)) size *= 2;
  int merges = 0;
  while (int64_t{kChunk} << merges < k) ++merges;
  // The last merge ends in `out`.
  uint64_t* keys[2] = {out.keys.as<uint64_t>(), memory_.spare_keys};
  int32_t* slots[2] = {out.slots.as<int32_t>(), memory_.spare_slots};
  int at = merges % 2;
  const gpu::StreamHandle handle = NativeHandle(stream_);
  gpu::Launch({dim3(static_cast<unsigned>(lists * chunks)), dim3(kThreads), 0, handle}, SortChunks,
              memory_.view, k, chunks, size, keys[at], slots[at]);
  for (int64_t run = kChunk; run < k; run *= 2, at ^= 1) {
    const int blocks = static_cast<int>(Blocks(k, kThreads));
    gpu::Launch({dim3(static_cast<unsigned>(lists * blocks)), dim3(kThreads), 0, handle}, MergeRuns,
                keys[at], slots[at], keys[at ^ 1], slots[at ^ 1], k, static_cast<int>(run), blocks);
  }
}

}  // namespace trireme::cuda
