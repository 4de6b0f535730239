#include "core/sampler.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "core/clips.h"
#include "core/philox.h"

namespace fastskel {

namespace {

std::uint64_t key_of(std::uint64_t seed, std::uint32_t epoch, std::int64_t position, std::uint32_t use) noexcept {
  std::uint32_t words[2];
  philox_words(seed, static_cast<std::uint32_t>(position), epoch, 0, use, 2, words);
  return words[0] | static_cast<std::uint64_t>(words[1]) << 32;
}

// upper half of the 128-bit product; the sums of halves fit 64 bits
std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) noexcept {
  constexpr std::uint64_t kLow = 0xFFFFFFFFu;
  const std::uint64_t middle = (a >> 32) * (b & kLow) + ((a & kLow) * (b & kLow) >> 32);
  const std::uint64_t other = (a & kLow) * (b >> 32) + (middle & kLow);
  return (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32);
}

}  // namespace

std::vector<std::int64_t> permutation(std::uint64_t seed, std::uint32_t epoch, std::int64_t n) {
  std::vector<std::pair<std::uint64_t, std::int64_t>> keys(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) keys[static_cast<std::size_t>(i)] = {key_of(seed, epoch, i, kUseShuffle), i};
  // pairs compare the position last, which makes the order stable
  std::sort(keys.begin(), keys.end());
  std::vector<std::int64_t> order(keys.size());
  std::transform(keys.begin(), keys.end(), order.begin(), [](const auto& key) { return key.second; });
  return order;
}

std::vector<std::int64_t> weighted_order(std::uint64_t seed, std::uint32_t epoch, const std::uint64_t* weights,
                                         std::int64_t n, std::int64_t num) {
  constexpr std::uint64_t kLimit = std::uint64_t{1} << 63;
  std::vector<std::uint64_t> cumulative(static_cast<std::size_t>(n));
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < cumulative.size(); ++i) {
    if (weights[i] >= kLimit - total) {
      throw Error("epoch_order: weights must be of a sum below 2^63, got more at position " + std::to_string(i) +
                  ". Scale them down.");
    }
    cumulative[i] = total += weights[i];
  }
  if (total == 0) throw Error("epoch_order: weights must be positive somewhere, got zeros. Give one clip a weight.");
  std::vector<std::int64_t> order(static_cast<std::size_t>(num));
  for (std::int64_t i = 0; i < num; ++i) {
    const std::uint64_t target = multiply_high(key_of(seed, epoch, i, kUseWeighted), total);
    order[static_cast<std::size_t>(i)] =
        std::upper_bound(cumulative.begin(), cumulative.end(), target) - cumulative.begin();
  }
  return order;
}

std::vector<std::int64_t> rank_share(const std::vector<std::int64_t>& order, std::int64_t rank, std::int64_t world_size,
                                     std::int64_t num) {
  std::vector<std::int64_t> share(static_cast<std::size_t>(num));
  const auto length = static_cast<std::int64_t>(order.size());
  for (std::int64_t i = 0; i < num; ++i) {
    share[static_cast<std::size_t>(i)] = order[static_cast<std::size_t>((rank + i * world_size) % length)];
  }
  return share;
}

}  // namespace fastskel
