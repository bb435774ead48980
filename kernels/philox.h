// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). The number is a pure function of (seed, position, token), so sampling gives
// the same result in any batch and layout, and the same source gives it on every device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TRIREME_HOST_DEVICE __host__ __device__
#else
#define TRIREME_HOST_DEVICE
#endif

namespace trireme {

struct PhiloxBlock {
  uint32_t x[4];
  bool operator==(const PhiloxBlock&) const = default;
};

TRIREME_HOST_DEVICE inline PhiloxBlock Philox4x32(PhiloxBlock counter, uint32_t key0,
                                                  uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.x[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.x[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.x[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.x[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The 32 random bits for choosing `token` at `position`.
TRIREME_HOST_DEVICE inline uint32_t TokenBits(uint64_t seed, uint64_t position, uint32_t token) {
  return Philox4x32(
             {{token, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0}},
             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
      .x[0];
}

// Largest value GumbelNoise can return: u = 1 - 2^-33 gives -log(-log(u)) = 22.87.
inline constexpr double kMaxGumbelNoise = 22.88;

// Standard Gumbel noise out of 32 random bits.
TRIREME_HOST_DEVICE inline double GumbelOf(uint32_t bits) {
  const double u = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return -log(-log(u));
}
// Standard Gumbel noise for choosing `token` at `position`.
TRIREME_HOST_DEVICE inline double GumbelNoise(uint64_t seed, uint64_t position, uint32_t token) {
  return GumbelOf(TokenBits(seed, position, token));
}

}  // namespace trireme
