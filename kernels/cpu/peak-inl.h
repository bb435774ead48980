// What the processor could do at best: the ceilings that benches divide by. Part of
// isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

// Independent chains that hide the latency of multiply-add (4 to 6 cycles, one or two a cycle). On
// AVX-512 each is one register.
#if defined(__AVX512F__)
inline constexpr int kChains = 16;
#else
inline constexpr int kChains = 4;
#endif

[[gnu::noinline]] inline float FloatChains(int64_t rounds) {
  F32 sums[kChains] = {};
  F32 a = Splat(1.0f), b = Splat(1e-6f);
  asm volatile("" : "+m"(rounds));  // a call with the same arguments must be made again
  for (int64_t i = 0; i < rounds; ++i) {
    Unroll<kChains>([&](auto c) TRIREME_INLINE_LAMBDA { sums[c] = MulAdd(a, sums[c], b); });
  }
  F32 all = {};
  Unroll<kChains>([&](auto c) TRIREME_INLINE_LAMBDA { all += sums[c]; });
  return Sum(all);
}

#if defined(__AVX512BF16__)
[[gnu::noinline]] inline float Bf16Chains(int64_t rounds) {
  __m512 sums[kChains];
  Unroll<kChains>([&](auto c) TRIREME_INLINE_LAMBDA { sums[c] = _mm512_setzero_ps(); });
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3580);
  asm volatile("" : "+m"(rounds));
  for (int64_t i = 0; i < rounds; ++i) {
    Unroll<kChains>([&](auto c)
                        TRIREME_INLINE_LAMBDA { sums[c] = _mm512_dpbf16_ps(sums[c], a, b); });
  }
  F32 all = {};
  Unroll<kChains>([&](auto c) TRIREME_INLINE_LAMBDA { all.part[0] += (Part<float>)sums[c]; });
  return Sum(all);
}
#endif

inline double PeakFlops(DType dtype, int64_t rounds) {
  const double flops = 2.0 * static_cast<double>(kLanes * kChains) * static_cast<double>(rounds);
  volatile float keep;
#if defined(__AVX512BF16__)
  if (dtype == DType::kBF16) {
    keep = Bf16Chains(rounds);
    return 2 * flops;
  }
#endif
  (void)dtype;
  keep = FloatChains(rounds);
  (void)keep;
  return flops;
}

inline float ReadSum(const void* data, int64_t bytes) {
  const float* p = static_cast<const float*>(data);
  F32 sums[4] = {};
  for (int64_t i = 0; i < bytes / 4; i += 4 * kLanes) {
    Unroll<4>([&](auto c) TRIREME_INLINE_LAMBDA { sums[c] += Load(p + i + c * kLanes); });
  }
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace trireme::cpu::TRIREME_ISA
