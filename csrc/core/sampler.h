// The order of an epoch: a function of seed and epoch alone.
#pragma once

#include <cstdint>
#include <vector>

namespace fastskel {

// what native code draws for; the numbers are those of fastskel.philox.Use
constexpr std::uint32_t kUseShuffle = 0, kUseWeighted = 10;

// range(n), n < 2^32, in the stable order of 64-bit keys, word 0 of (seed, i, epoch, 0, SHUFFLE) the lower half
std::vector<std::int64_t> permutation(std::uint64_t seed, std::uint32_t epoch, std::int64_t n);

// `num` < 2^32 positions drawn with replacement, each with the odds of its weight: draw i takes the first position whose
// cumulative weight exceeds key * total / 2^64, its key as above with use WEIGHTED. Error unless 0 < total < 2^63
std::vector<std::int64_t> weighted_order(std::uint64_t seed, std::uint32_t epoch, const std::uint64_t* weights,
                                         std::int64_t n, std::int64_t num);

// entries rank, rank + world_size, .. of an order that is repeated from its beginning, `num` of them
std::vector<std::int64_t> rank_share(const std::vector<std::int64_t>& order, std::int64_t rank, std::int64_t world_size,
                                     std::int64_t num);

}  // namespace fastskel
