// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). The number is a pure function of (seed, position, token), so sampling gives
// the same result in any batch and layout.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace trireme {

inline std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                          std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Largest value GumbelNoise can return: u = 1 - 2^-33 gives -log(-log(u)) = 22.87.
inline constexpr double kMaxGumbelNoise = 22.88;

// Standard Gumbel noise for choosing `token` at `position`.
inline double GumbelNoise(uint64_t seed, uint64_t position, uint32_t token) {
  const auto bits =
      Philox4x32({token, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const double u = (static_cast<double>(bits[0]) + 0.5) * 0x1p-32;
  return -std::log(-std::log(u));
}

}  // namespace trireme
