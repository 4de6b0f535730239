// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the addressing of draws.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastskel {

using PhiloxBlock = std::array<std::uint32_t, 4>;

// four random words for one 128-bit counter under one 64-bit key
inline PhiloxBlock philox4x32(PhiloxBlock counter, std::uint64_t seed) noexcept {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(product0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// a float in [0, 1): the upper 24 bits, which float32 holds exactly
inline float uniform(std::uint32_t word) noexcept { return static_cast<float>(word >> 8) * 0x1p-24f; }

// a float in [-1, 1), exact
inline float symmetric(std::uint32_t word) noexcept { return uniform(word) * 2.0f - 1.0f; }

// an integer in [0, bound)
inline std::uint32_t below(std::uint32_t word, std::uint32_t bound) noexcept {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(word) * bound) >> 32);
}

// `num` words of one sample from word 4 * first_block on: word w is word w % 4 of the block with counter
// (index, step, view | use << 16, w / 4)
inline void philox_words(std::uint64_t seed, std::uint32_t index, std::uint32_t step, std::uint32_t view,
                         std::uint32_t use, std::size_t num, std::uint32_t* out, std::uint32_t first_block = 0) noexcept {
  const std::uint32_t purpose = view | (use << 16);
  for (std::size_t word = 0; word < num; word += 4) {
    const auto number = static_cast<std::uint32_t>(first_block + word / 4);
    const PhiloxBlock block = philox4x32({index, step, purpose, number}, seed);
    const std::size_t count = num - word < 4 ? num - word : 4;
    for (std::size_t i = 0; i < count; ++i) out[word + i] = block[i];
  }
}

}  // namespace fastskel
