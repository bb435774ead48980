// Row-wise ops: shared out between threads here, computed by the instruction set's loops
// (elementwise-inl.h).
#include <cstring>

#include "kernels/cpu/cpu_ops.h"

namespace trireme::cpu {

void GatherRows(Stream& stream, ConstTensorView x, ConstTensorView indices, TensorView out) {
  const size_t row_bytes = x.dim(1) * SizeOf(x.dtype);
  const int64_t size = static_cast<int64_t>(SizeOf(x.dtype));
  const int32_t* index = indices.as<int32_t>();
  PoolOf(stream).ParallelFor(indices.dim(0), RowGrain(x.dim(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      CHECK(index[i] >= 0 && index[i] < x.dim(0))
          << "gather index " << index[i] << " of " << x.dim(0) << " rows";
      std::memcpy(out.as<char>() + i * out.stride0 * size,
                  x.as<char>() + index[i] * x.stride0 * size, row_bytes);
    }
  });
}

void Norm(Stream& stream, ConstTensorView x, const NormParams& norm, TensorView out) {
  PoolOf(stream).ParallelFor(x.dim(0), RowGrain(x.dim(1)), [&](int64_t begin, int64_t end) {
    BestIsa().norm(x, norm, out, begin, end);
  });
}

void AddNorm(Stream& stream, TensorView residual, ConstTensorView delta, const NormParams& norm,
             TensorView out) {
  PoolOf(stream).ParallelFor(out.dim(0), RowGrain(out.dim(1)), [&](int64_t begin, int64_t end) {
    BestIsa().add_norm(residual, delta, norm, out, begin, end);
  });
}

void Add(Stream& stream, TensorView x, ConstTensorView delta) {
  PoolOf(stream).ParallelFor(x.dim(0), RowGrain(x.dim(1)), [&](int64_t begin, int64_t end) {
    BestIsa().add(x, delta, begin, end);
  });
}

void Gelu(Stream& stream, TensorView x) {
  PoolOf(stream).ParallelFor(x.dim(0), RowGrain(x.dim(1)),
                             [&](int64_t begin, int64_t end) { BestIsa().gelu(x, begin, end); });
}

void SiluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  PoolOf(stream).ParallelFor(out.dim(0), RowGrain(2 * out.dim(1)), [&](int64_t begin, int64_t end) {
    BestIsa().silu_and_mul(gate_up, out, begin, end);
  });
}

void RopeAndStoreKv(Stream& stream, TensorView qkv, ConstTensorView positions,
                    ConstTensorView slot_mapping, const RopeParams& rope, int64_t q_heads,
                    const PagedKv& kv) {
  const int64_t slots = kv.k.dim(0) * kv.k.dim(1);
  for (int64_t t = 0; t < qkv.dim(0); ++t) {
    const int32_t position = positions.as<int32_t>()[t];
    CHECK(position >= 0 && position < rope.cos_sin.dim(0))
        << "position " << position << " of row " << t;
    CHECK_LT(slot_mapping.as<int64_t>()[t], slots) << "slot of row " << t;
  }
  const RopeRows rows{.qkv = qkv,
                      .positions = positions,
                      .slot_mapping = slot_mapping,
                      .cos_sin = rope.cos_sin,
                      .q_norm = rope.q_norm,
                      .k_norm = rope.k_norm,
                      .norm_eps = rope.norm_eps,
                      .q_heads = q_heads,
                      .k = kv.k,
                      .v = kv.v};
  PoolOf(stream).ParallelFor(qkv.dim(0), RowGrain(qkv.dim(1)), [&](int64_t begin, int64_t end) {
    BestIsa().rope_and_store_kv(rows, begin, end);
  });
}

}  // namespace trireme::cpu
