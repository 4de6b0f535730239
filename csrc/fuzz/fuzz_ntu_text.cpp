// Whatever the bytes, the parser returns a whole result or throws its own error, and its numbers are strtod's.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "core/ntu_text.h"

namespace {

void check(bool holds) {
  if (!holds) std::abort();
}

// every word of a sound file in order; the parser has said that all are numbers
std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> found;
  std::size_t begin = 0;
  while ((begin = text.find_first_not_of(" \t\r\n", begin)) != std::string::npos) {
    const std::size_t end = std::min(text.find_first_of(" \t\r\n", begin), text.size());
    found.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return found;
}

void check_value(float value, const std::string& word) {
  const auto expected = static_cast<float>(std::strtod(word.c_str(), nullptr));
  check(std::isnan(expected) ? std::isnan(value) : value == expected && std::signbit(value) == std::signbit(expected));
}

void check_result(const fastskel::NtuText& result, const std::string& text, std::size_t num_joints, bool all_values) {
  const std::size_t num_values = all_values ? fastskel::kNtuJointValues : fastskel::kNtuCoordinates;
  const std::size_t num_bodies = result.ids.size();
  check(std::accumulate(result.num_bodies.begin(), result.num_bodies.end(), std::int64_t{0}) ==
        static_cast<std::int64_t>(num_bodies));
  check(result.trackers.size() == num_bodies * fastskel::kNtuBodyValues);
  check(result.joints.size() == num_bodies * num_joints * num_values);
  check(result.num_bodies.size() <= text.size());
  const std::vector<std::string> expected = words(text);
  std::size_t word = 1, body = 0, joint = 0;
  check(std::strtoll(expected.at(0).c_str(), nullptr, 10) == static_cast<std::int64_t>(result.num_bodies.size()));
  for (const std::int64_t count : result.num_bodies) {
    check(std::strtoll(expected.at(word++).c_str(), nullptr, 10) == count);
    for (const std::size_t last = body + static_cast<std::size_t>(count); body < last; ++body) {
      check(std::strtoll(expected.at(word++).c_str(), nullptr, 10) == result.ids[body]);
      for (std::size_t i = 0; i < fastskel::kNtuBodyValues; ++i) {
        check_value(result.trackers[body * fastskel::kNtuBodyValues + i], expected.at(word++));
      }
      ++word;
      for (std::size_t i = 0; i < num_joints; ++i, word += fastskel::kNtuJointValues) {
        for (std::size_t j = 0; j < num_values; ++j) check_value(result.joints[joint++], expected.at(word + j));
      }
    }
  }
  check(word == expected.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  for (const std::size_t num_joints : {std::size_t{1}, std::size_t{2}}) {
    for (const bool all_values : {false, true}) {
      try {
        // a copy of the exact size: one byte read beyond it is seen
        const std::vector<char> copy(text.begin(), text.end());
        check_result(fastskel::parse_ntu(copy.data(), copy.size(), num_joints, all_values), text, num_joints, all_values);
      } catch (const fastskel::NtuError& error) {
        check(std::string(error.what()).rfind("line ", 0) == 0);
      }
    }
  }
  return 0;
}
