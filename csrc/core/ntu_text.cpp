#include "core/ntu_text.h"

#include <array>
#include <cfloat>
#include <charconv>
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#include <system_error>

namespace fastskel {

namespace {

// a word in a message is cut to this many characters
constexpr std::ptrdiff_t kShown = 24;
// the shortest texts: one digit and the blank or the end of line after it, for every number
constexpr std::size_t kFrameBytes = 2;
constexpr std::size_t kHeaderBytes = 2 * (1 + kNtuBodyValues) + 2;
constexpr std::size_t kJointBytes = 2 * kNtuJointValues;

// powers of ten that a double holds exactly: with digits that it holds exactly too, one product or quotient is the
// nearest double; not so where the machine computes in more than 64 bits
constexpr std::array<double, 23> kPowers = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                            1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
constexpr std::int64_t kExactPower = 22;
constexpr std::uint64_t kExactDigits = std::uint64_t{1} << 53;
constexpr bool kPlainDoubles = FLT_EVAL_METHOD == 0;
// so many decimal digits fit 64 bits
constexpr std::ptrdiff_t kMaxDigits = 19;
// larger exponents are as good as this one: no file has so many digits that they could make up for it
constexpr std::int64_t kExponentLimit = std::int64_t{1} << 50;

constexpr const char* kBody = "a body id and 9 numbers";
constexpr const char* kJoint = "12 numbers of a joint";

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }
char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

// the power of ten above the first digit that is not zero
std::int64_t magnitude(const char* begin, const char* point, const char* end, std::int64_t exponent) {
  const char* first = begin;
  while (first != end && (*first == '0' || *first == '.')) ++first;
  return exponent + (point - first) + (first > point ? 1 : 0);
}

// any number without a sign whose form was checked; beyond the largest double it is infinite, as in Python
double slow_value(const char* begin, const char* end, std::int64_t power) {
  double value = 0;
#ifdef __cpp_lib_to_chars
  const bool in_range = std::from_chars(begin, end, value).ec != std::errc::result_out_of_range;
#else
  std::istringstream stream(std::string(begin, end));
  stream.imbue(std::locale::classic());
  const bool in_range = static_cast<bool>(stream >> value);
#endif
  if (in_range) return value;
  return power > 0 ? std::numeric_limits<double>::infinity() : 0.0;
}

class Parser {
 public:
  Parser(const char* text, std::size_t size, std::size_t num_joints, bool all_values)
      : at_(text),
        end_(text + size),
        num_joints_(num_joints),
        num_kept_(all_values ? kNtuJointValues : kNtuCoordinates),
        joint_count_("the number of joints (" + std::to_string(num_joints) + ")") {}

  NtuText run() {
    NtuText result;
    const std::size_t body_bytes = kHeaderBytes + num_joints_ * kJointBytes;
    const std::size_t num_frames = count("the number of frames", kFrameBytes);
    result.num_bodies.reserve(num_frames);
    for (std::size_t frame = 0; frame < num_frames; ++frame) {
      const std::size_t num_bodies = count("the number of bodies", body_bytes);
      result.num_bodies.push_back(static_cast<std::int64_t>(num_bodies));
      for (std::size_t body = 0; body < num_bodies; ++body) read_body(result);
    }
    skip_to_record();
    if (at_ != end_) fail("the end after " + std::to_string(num_frames) + " frames", word());
    return result;
  }

 private:
  void read_body(NtuText& result) {
    const char* begin_of_body = at_;
    open(kBody);
    result.ids.push_back(integer(kBody));
    for (std::size_t i = 1; i <= kNtuBodyValues; ++i) result.trackers.push_back(number(kBody, i));
    close(kBody);
    open(joint_count_.c_str());
    const char* begin = at_;
    if (integer(joint_count_.c_str()) != static_cast<std::int64_t>(num_joints_)) {
      at_ = begin;
      fail(joint_count_, word());
    }
    close(joint_count_.c_str());
    const std::size_t first = result.joints.size();
    const std::size_t num_values = num_joints_ * num_kept_;
    result.joints.resize(first + num_values);
    float* out = result.joints.data() + first;
    for (std::size_t joint = 0; joint < num_joints_; ++joint, out += num_kept_) {
      open(kJoint);
      for (std::size_t i = 0; i < num_kept_; ++i) out[i] = number(kJoint, i);
      for (std::size_t i = num_kept_; i < kNtuJointValues; ++i) number(kJoint, i);
      close(kJoint);
    }
    // the others are about as long as the first: without this, growing costs more than parsing
    if (first == 0) {
      result.joints.reserve(num_values * (2 + static_cast<std::size_t>((end_ - at_) / (at_ - begin_of_body))));
    }
  }

  // a line with nothing but how many records follow, each of `record_bytes` at least
  std::size_t count(const char* what, std::size_t record_bytes) {
    open(what);
    const char* begin = at_;
    const std::int64_t value = integer(what);
    const std::size_t most = static_cast<std::size_t>(end_ - at_) / record_bytes;
    if (value < 0 || static_cast<std::uint64_t>(value) > most) {
      at_ = begin;
      fail(std::string(what) + " (0 to " + std::to_string(most) + " fit the rest of the file)", word());
    }
    close(what);
    return static_cast<std::size_t>(value);
  }

  std::int64_t integer(const char* what) {
    const char* begin = at_;
    const bool negative = at_ != end_ && *at_ == '-';
    if (negative) ++at_;
    std::uint64_t value = 0;
    const char* digits = at_;
    constexpr std::uint64_t kLimit = std::numeric_limits<std::int64_t>::max();
    bool fits = true;
    for (; at_ != end_ && is_digit(*at_); ++at_) {
      const auto digit = static_cast<std::uint64_t>(*at_ - '0');
      fits = fits && value <= (kLimit - digit) / 10;
      value = fits ? value * 10 + digit : value;
    }
    if (at_ == digits || !fits || !at_word_end()) {
      at_ = begin;
      fail(what, word() + ", no whole number of 64 bits");
    }
    return negative ? -static_cast<std::int64_t>(value) : static_cast<std::int64_t>(value);
  }

  float number(const char* what, std::size_t index) {
    skip_blanks();
    const char* p = at_;
    const bool negative = p != end_ && *p == '-';
    if (p != end_ && (*p == '-' || *p == '+')) ++p;
    const char* begin = p;
    std::uint64_t digits = 0;
    while (p != end_ && is_digit(*p)) digits = digits * 10 + static_cast<std::uint64_t>(*p++ - '0');
    const char* point = p;
    std::ptrdiff_t num_decimals = 0;
    if (p != end_ && *p == '.') {
      ++p;
      while (p != end_ && is_digit(*p)) digits = digits * 10 + static_cast<std::uint64_t>(*p++ - '0');
      num_decimals = p - point - 1;
    }
    const std::ptrdiff_t num_digits = point - begin + num_decimals;
    if (num_digits == 0) return special(what, index, begin, negative);
    std::int64_t exponent = 0;
    if (p != end_ && lower(*p) == 'e') p = read_exponent(p + 1, exponent, what, index);
    const char* start = at_;
    at_ = p;
    if (!at_word_end()) wrong_number(what, index, start);
    const std::int64_t power = exponent - num_decimals;
    double value = 0;
    if (kPlainDoubles && num_digits <= kMaxDigits && digits <= kExactDigits && power <= kExactPower &&
        power >= -kExactPower) {
      value = power < 0 ? static_cast<double>(digits) / kPowers[static_cast<std::size_t>(-power)]
                        : static_cast<double>(digits) * kPowers[static_cast<std::size_t>(power)];
    } else {
      value = slow_value(begin, p, magnitude(begin, point, p, exponent));
    }
    return static_cast<float>(negative ? -value : value);
  }

  const char* read_exponent(const char* p, std::int64_t& exponent, const char* what, std::size_t index) {
    const bool negative = p != end_ && *p == '-';
    if (p != end_ && (*p == '-' || *p == '+')) ++p;
    if (p == end_ || !is_digit(*p)) wrong_number(what, index, at_);
    for (; p != end_ && is_digit(*p); ++p) {
      if (exponent < kExponentLimit) exponent = exponent * 10 + (*p - '0');
    }
    if (negative) exponent = -exponent;
    return p;
  }

  // what is no decimal number: the words for infinity and for no number, or a mistake
  float special(const char* what, std::size_t index, const char* begin, bool negative) {
    using Limits = std::numeric_limits<float>;
    const char* start = at_;
    const struct {
      const char* name;
      float value;
    } words[] = {{"infinity", Limits::infinity()}, {"inf", Limits::infinity()}, {"nan", Limits::quiet_NaN()}};
    for (const auto& entry : words) {
      at_ = begin;
      const char* name = entry.name;
      while (*name != '\0' && at_ != end_ && lower(*at_) == *name) ++at_, ++name;
      if (*name == '\0' && at_word_end()) return negative ? -entry.value : entry.value;
    }
    wrong_number(what, index, start);
  }

  [[noreturn]] void wrong_number(const char* what, std::size_t index, const char* start) {
    at_ = start;
    if (at_ == end_ || *at_ == '\n') fail(what, "only " + std::to_string(index));
    fail(what, word() + " as number " + std::to_string(index + 1));
  }

  // to the beginning of the next line that is not blank, and of its first word
  void open(const char* what) {
    skip_to_record();
    if (at_ == end_) fail(what, "the end of the file");
  }

  void close(const char* what) {
    skip_blanks();
    if (at_ != end_ && *at_ != '\n') fail(what, word() + " after it");
  }

  void skip_blanks() {
    while (at_ != end_ && is_blank(*at_)) ++at_;
  }

  void skip_to_record() {
    for (; at_ != end_ && (is_blank(*at_) || *at_ == '\n'); ++at_) line_ += *at_ == '\n';
  }

  bool at_word_end() const { return at_ == end_ || is_blank(*at_) || *at_ == '\n'; }

  // the word at the place, for a message
  std::string word() const {
    const char* hex = "0123456789abcdef";
    std::string shown = "'";
    const char* p = at_;
    for (; p != end_ && !is_blank(*p) && *p != '\n' && p - at_ < kShown; ++p) {
      const auto code = static_cast<unsigned char>(*p);
      if (code > ' ' && code < 127) {
        shown += *p;
      } else {
        shown += {'\\', 'x', hex[code >> 4], hex[code & 15]};
      }
    }
    return shown + (p - at_ == kShown ? "...'" : "'");
  }

  [[noreturn]] void fail(const std::string& contract, const std::string& actual) const {
    throw NtuError("line " + std::to_string(line_) + " must be " + contract + ", got " + actual);
  }

  const char* at_;
  const char* end_;
  std::size_t num_joints_;
  std::size_t num_kept_;
  std::string joint_count_;
  std::int64_t line_ = 1;
};

}  // namespace

NtuText parse_ntu(const char* text, std::size_t size, std::size_t num_joints, bool all_values) {
  return Parser(text, size, num_joints, all_values).run();
}

}  // namespace fastskel
