// Orders of an epoch; their bits are compared with NumPy in tests/data/test_stream.py.
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/sampler.h"

namespace fastskel_tests {

void test_sampler() {
  using Order = std::vector<std::int64_t>;
  // docs/design.md, test vectors
  check(fastskel::permutation(7, 2, 8) == Order{0, 1, 6, 7, 4, 3, 5, 2}, "documented order");
  check(fastskel::permutation(7, 2, 0).empty() && fastskel::permutation(7, 2, 1) == Order{0}, "small orders");

  const std::vector<std::uint64_t> weights = {0, 1, 0, 3, std::uint64_t{1} << 34, 0};
  const auto num = static_cast<std::int64_t>(weights.size());
  for (const std::int64_t position : fastskel::weighted_order(3, 4, weights.data(), num, 2000)) {
    check(position >= 0 && position < num && weights[static_cast<std::size_t>(position)] > 0, "a weight of zero is not drawn");
  }
  const std::vector<std::uint64_t> even = {1, 3};
  std::int64_t ones = 0;
  for (const std::int64_t position : fastskel::weighted_order(0, 0, even.data(), 2, 40000)) ones += position;
  // three quarters, within five deviations of a binomial
  check(ones > 30000 - 5 * 87 && ones < 30000 + 5 * 87, "odds of a weighted order");
  const std::vector<std::uint64_t> zeros(3), huge = {std::uint64_t{1} << 62, std::uint64_t{1} << 62};
  check_error([&] { fastskel::weighted_order(0, 0, zeros.data(), 3, 1); }, "weights must be positive somewhere");
  check_error([&] { fastskel::weighted_order(0, 0, huge.data(), 2, 1); }, "of a sum below 2^63, got more at position 1");

  const Order order = {5, 6, 7, 8, 9};
  check(fastskel::rank_share(order, 0, 1, 5) == order, "one rank has everything");
  check(fastskel::rank_share(order, 1, 2, 2) == Order{6, 8}, "share of a rank");
  check(fastskel::rank_share(order, 1, 2, 3) == Order{6, 8, 5}, "the order wraps around");
  check(fastskel::rank_share(order, 6, 7, 1) == Order{6}, "more ranks than clips");
}

}  // namespace fastskel_tests
