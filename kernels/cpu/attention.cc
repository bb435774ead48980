// Paged attention: cuts a ragged batch into (sequence, query block, kv head) tasks; attention-inl.h
// computes one. The query heads that share a kv head go through together, so each key and value is
// read once per group.
#include <algorithm>

#include "kernels/cpu/cpu_ops.h"

namespace trireme::cpu {
namespace {

// Query blocks of one sequence.
int64_t Blocks(int64_t q_len, int64_t block_rows) { return (q_len + block_rows - 1) / block_rows; }

void CheckSequences(const PagedKv& kv, ConstTensorView cu_q_lens, ConstTensorView kv_lens,
                    int64_t tokens) {
  const int32_t* cu = cu_q_lens.as<int32_t>();
  CHECK_EQ(cu[0], 0);
  CHECK_EQ(cu[kv_lens.dim(0)], tokens);
  for (int64_t s = 0; s < kv_lens.dim(0); ++s) {
    const int32_t length = kv_lens.as<int32_t>()[s];
    CHECK_GE(cu[s + 1], cu[s]) << "sequence " << s;
    CHECK_LE(cu[s + 1] - cu[s], length) << "sequence " << s << " has more queries than keys";
    const int64_t pages = (length + kv.k.dim(1) - 1) / kv.k.dim(1);
    CHECK_LE(pages, kv.page_tables.dim(1)) << "sequence " << s << " of " << length << " keys";
    for (int64_t i = 0; i < pages && cu[s + 1] > cu[s]; ++i) {
      const int32_t page = kv.page_tables.row<int32_t>(s)[i];
      CHECK(page >= 0 && page < kv.k.dim(0)) << "page " << page << " of sequence " << s;
    }
  }
}

}  // namespace

void PagedAttention(Stream& stream, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out) {
  const int64_t sequences = kv_lens.dim(0), kv_heads = kv.k.dim(2), head_dim = kv.k.dim(3);
  const int64_t group = q.dim(1) / (kv_heads * head_dim);
  const int64_t block_rows = std::max<int64_t>(1, kAttentionRows / group);
  const int32_t* cu = cu_q_lens.as<int32_t>();
  CheckSequences(kv, cu_q_lens, kv_lens, q.dim(0));
  int64_t tasks = 0, work = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t q_len = cu[s + 1] - cu[s];
    tasks += Blocks(q_len, block_rows) * kv_heads;
    work += q_len * kv_lens.as<int32_t>()[s] * q.dim(1);
  }
  // A multiply-add or two a cycle and lane: 200,000 are about 5 us, what waking the workers has to
  // be worth.
  const int64_t grain = work < 200000 ? tasks : 1;
  PoolOf(stream).ParallelFor(tasks, grain, [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(
        Scratch(sizeof(float) * AttentionScratchFloats(head_dim, std::max(group, kAttentionRows))));
    AttentionBlock block{.q = q,
                         .k = kv.k,
                         .v = kv.v,
                         .page_tables = kv.page_tables,
                         .out = out,
                         .scale = shape.scale,
                         .sliding_window = shape.sliding_window,
                         .group = group};
    int64_t s = 0, before = 0;  // sequence of the task, tasks before it
    for (int64_t task = begin; task < end; ++task) {
      int64_t here = Blocks(cu[s + 1] - cu[s], block_rows) * kv_heads;
      while (task - before >= here) {
        before += here;
        ++s;
        here = Blocks(cu[s + 1] - cu[s], block_rows) * kv_heads;
      }
      // Long blocks first: the last rows see the most keys.
      const int64_t q_block = (here - 1 - (task - before)) / kv_heads;
      block.sequence = s;
      block.kv_head = (task - before) % kv_heads;
      block.row_begin = cu[s] + q_block * block_rows;
      block.row_end = std::min<int64_t>(cu[s + 1], block.row_begin + block_rows);
      block.first_position = kv_lens.as<int32_t>()[s] - (cu[s + 1] - block.row_begin);
      BestIsa().attention(block, scratch);
    }
  });
}

}  // namespace trireme::cpu
