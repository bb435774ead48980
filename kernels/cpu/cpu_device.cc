#include "kernels/cpu/cpu_device.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/mol_ops.h"

namespace trireme {
namespace cpu {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kHugePage = size_t{2} << 20;

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

int UsableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

// What the machine has, or what the control group leaves of it.
int64_t MemoryBytes() {
  int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  std::ifstream limit_file("/sys/fs/cgroup/memory.max");
  int64_t limit = 0;
  if (limit_file >> limit && limit > 0) bytes = std::min(bytes, limit);
  return bytes;
}

// Pages come zeroed from the system when first touched, by the thread that touches them; 2 MiB
// pages spare a streaming read the walks of the page table.
void* MapHuge(size_t bytes) {
  const size_t length = RoundUp(bytes, kHugePage);
  void* raw =
      mmap(nullptr, length + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  char* aligned = reinterpret_cast<char*>(RoundUp(reinterpret_cast<size_t>(begin), kHugePage));
  if (aligned != begin) munmap(begin, aligned - begin);
  if (const size_t tail = kHugePage - (aligned - begin); tail > 0) munmap(aligned + length, tail);
  madvise(aligned, length, MADV_HUGEPAGE);
  return aligned;
}

class CpuStream final : public Stream {
 public:
  CpuStream(Device* device, const OpTable* ops) : Stream(device, ops) {}
  void Copy(void* dst, const void* src, size_t bytes) override {
    if (bytes > 0) std::memmove(dst, src, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }
};

constexpr MolOpTable kMolOps = {
    .pack_gate = PackMolGate,
    .silu = Silu,
    .gelu_and_mul = GeluAndMul,
    .l2_normalize = L2Normalize,
    .store = MolStore,
    .workspace_bytes = MolWorkspaceBytes,
    .search = MolSearch,
    .average_topk = MolAverageTopK,
    .logit_topk = MolLogitTopK,
    .last_keys = MolLastKeys,
    .candidates = MolCandidates,
    .rescore = MolRescore,
    .piece_bytes = 0,
};

constexpr OpTable kOps = {
    .embedding = Embedding,
    .norm = Norm,
    .add_norm = AddNorm,
    .add = Add,
    .matmul = MatMul,
    .matmul_swiglu = MatMulSwiGlu,
    .matmul_gelu = MatMulGelu,
    .reserve_matmul = nullptr,
    .rope_and_store_kv = RopeAndStoreKv,
    .paged_attention = PagedAttention,
    .attention_workspace_bytes = nullptr,
    .gelu = Gelu,
    .silu_and_mul = SiluAndMul,
    .gather_rows = GatherRows,
    .penalize_logits = PenalizeLogits,
    .summarize_logits = SummarizeLogits,
    .draw_tokens = DrawTokens,
    .restore_logits = RestoreLogits,
    .choose_tokens = ChooseTokens,
    .pack_linear = PackLinearFrom,
    .mol = &kMolOps,
};

}  // namespace

CpuDevice::CpuDevice(int threads) : pool_(threads) {
  spec_.name = "cpu";
  spec_.threads = threads;
  spec_.host_memory = true;
  spec_.memory_bytes = MemoryBytes();
}

absl::StatusOr<Buffer> CpuDevice::Allocate(size_t bytes) {
  allocated_bytes_ += static_cast<int64_t>(bytes);
  if (bytes >= kHugePage) {
    void* data = bytes < SIZE_MAX / 2 ? MapHuge(bytes) : nullptr;
    if (data != nullptr) {
      return Buffer(data, bytes, [](void* p, size_t n) { munmap(p, RoundUp(n, kHugePage)); });
    }
  } else {
    const size_t length = RoundUp(std::max(bytes, size_t{1}), kAlignment);
    void* data = std::aligned_alloc(kAlignment, length);
    if (data != nullptr) {
      std::memset(data, 0, length);
      return Buffer(data, bytes, [](void* p, size_t) { std::free(p); });
    }
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "device cpu: no memory for ", bytes, " bytes (the machine has ", spec_.memory_bytes,
      "): lower --max-num-seqs, --max-model-len or --kv-cache-memory, or use more ranks"));
}

absl::StatusOr<std::unique_ptr<Stream>> CpuDevice::NewStream() {
  return std::unique_ptr<Stream>(new CpuStream(this, &kOps));
}

}  // namespace cpu

absl::StatusOr<std::unique_ptr<Device>> NewCpuDevice(int threads) {
  constexpr int kMaxThreads = 1024;
  if (threads < 0 || threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("--threads ", threads, ": must lie in 0 (all cores) to ", kMaxThreads));
  }
  return std::unique_ptr<Device>(new cpu::CpuDevice(threads == 0 ? cpu::UsableCores() : threads));
}

}  // namespace trireme
