#include "core/npy.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fastskel {

namespace {

constexpr unsigned char kMagic[] = {0x93, 'N', 'U', 'M', 'P', 'Y'};
constexpr std::int64_t kInt64Max = std::numeric_limits<std::int64_t>::max();
// the format has always padded its header to a multiple of 16; values are then aligned where the file is
constexpr std::size_t kAlignment = 16;

[[noreturn]] void fail(const std::string& path, const char* argument, const std::string& contract,
                       const std::string& actual) {
  throw Error("Clips: " + std::string(argument) + " must be " + contract + ", got " + actual + ", in " + path +
              ". Pack the data again.");
}

// reads the dictionary of a header: literals of Python, nothing but those that NumPy writes
class Reader {
 public:
  Reader(const unsigned char* begin, const unsigned char* end) : at_(begin), end_(end) {}

  void skip_spaces() noexcept {
    while (at_ != end_ && *at_ == ' ') ++at_;
  }
  bool take(unsigned char expected) noexcept {
    skip_spaces();
    if (at_ == end_ || *at_ != expected) return false;
    ++at_;
    return true;
  }
  bool text(std::string& out) {
    skip_spaces();
    if (at_ == end_ || (*at_ != '\'' && *at_ != '"')) return false;
    const unsigned char* close = std::find(at_ + 1, end_, *at_);
    if (close == end_) return false;
    out.assign(at_ + 1, close);
    at_ = close + 1;
    return true;
  }
  bool word(const char* expected) noexcept {
    skip_spaces();
    const std::size_t length = std::strlen(expected);
    if (static_cast<std::size_t>(end_ - at_) < length || std::memcmp(at_, expected, length) != 0) return false;
    at_ += length;
    return true;
  }
  // false also where the number does not fit
  bool number(std::int64_t& out) noexcept {
    skip_spaces();
    const unsigned char* first = at_;
    out = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      const std::int64_t digit = *at_ - '0';
      if (out > (kInt64Max - digit) / 10) return false;
      out = 10 * out + digit;
    }
    return at_ != first;
  }
  // what may follow the dictionary: spaces and the one line feed that ends the header
  bool finished() noexcept {
    skip_spaces();
    return end_ - at_ == 1 && *at_ == '\n';
  }

 private:
  const unsigned char* at_;
  const unsigned char* end_;
};

bool read_shape(Reader& reader, std::vector<std::int64_t>& shape, std::size_t limit) {
  if (!reader.take('(')) return false;
  while (!reader.take(')')) {
    std::int64_t length = 0;
    if (shape.size() == limit || !reader.number(length)) return false;
    shape.push_back(length);
    if (reader.take(',')) continue;
    return shape.size() > 1 && reader.take(')');
  }
  return true;
}

struct Array {
  std::size_t begin = 0;
  std::vector<std::int64_t> shape;
};

// values of `descr`, `item` bytes each, along `num_axes` axes, that fill the rest of the file exactly
Array parse_array(const unsigned char* bytes, std::size_t size, const std::string& path, const char* descr,
                  std::size_t item, std::size_t num_axes) {
  const std::string contract = "a .npy file, version 1.0 or 2.0, of " + std::string(descr) + " in C order with " +
                               std::to_string(num_axes) + (num_axes == 1 ? " axis" : " axes");
  const auto need = [&](bool ok, const std::string& actual) {
    if (!ok) fail(path, "file", contract, actual);
  };
  need(size >= sizeof(kMagic) + 4 && std::memcmp(bytes, kMagic, sizeof(kMagic)) == 0, "another kind of file");
  const unsigned char* after = bytes + sizeof(kMagic);
  const int major = after[0], minor = after[1];
  need((major == 1 || major == 2) && minor == 0, "version " + std::to_string(major) + "." + std::to_string(minor));
  const std::size_t length_bytes = major == 1 ? 2 : 4, prefix = sizeof(kMagic) + 2 + length_bytes;
  need(size >= prefix, "a file that ends in its header");
  std::size_t length = 0;
  for (std::size_t i = 0; i < length_bytes; ++i) length |= static_cast<std::size_t>(after[2 + i]) << (8 * i);
  need(length <= size - prefix, "a file that ends in its header");

  Array array;
  array.begin = prefix + length;
  need(array.begin % kAlignment == 0, "values that begin at byte " + std::to_string(array.begin));
  Reader reader(bytes + prefix, bytes + array.begin);
  bool has_descr = false, has_order = false, has_shape = false;
  need(reader.take('{'), "a header that is no dictionary");
  while (!reader.take('}')) {
    std::string key, value;
    need(reader.text(key) && reader.take(':'), "a header that is no dictionary");
    if (key == "descr" && !has_descr) {
      has_descr = reader.text(value);
      need(has_descr && value == descr, "values of type " + (has_descr ? value.substr(0, 40) : "unknown"));
    } else if (key == "fortran_order" && !has_order) {
      has_order = reader.word("False");
      need(has_order, "Fortran order");
    } else if (key == "shape" && !has_shape) {
      has_shape = read_shape(reader, array.shape, num_axes) && array.shape.size() == num_axes;
      need(has_shape, "another shape");
    } else {
      need(false, "a header with the key '" + key.substr(0, 40) + "'");
    }
    if (!reader.take(',')) {
      need(reader.take('}'), "a header that is no dictionary");
      break;
    }
  }
  need(reader.finished(), "more than a dictionary in the header");
  need(has_descr && has_order && has_shape, "a header without type, order or shape");

  std::size_t expected = item;
  std::string axes;
  for (const std::int64_t axis : array.shape) {
    axes += (axes.empty() ? "" : ", ") + std::to_string(axis);
    if (axis == 0 || expected == 0) {
      expected = 0;
    } else {
      need(static_cast<std::size_t>(axis) <= std::numeric_limits<std::size_t>::max() / expected,
           "a shape that no memory holds");
      expected *= static_cast<std::size_t>(axis);
    }
  }
  if (size - array.begin != expected) {
    fail(path, "file", std::to_string(expected) + " bytes of values, as its shape (" + axes + ") says",
         std::to_string(size - array.begin));
  }
  return array;
}

}  // namespace

PackedFrames parse_frames(const unsigned char* bytes, std::size_t size, const std::string& path) {
  const Array array = parse_array(bytes, size, path, "<f4", sizeof(float), 4);
  PackedFrames frames;
  frames.begin = array.begin;
  frames.num_frames = array.shape[0];
  frames.shape = {array.shape[1], array.shape[2], array.shape[3]};
  for (const std::int64_t axis : array.shape) {
    if (axis < 1) fail(path, "shape", "at least 1 along every axis", std::to_string(axis));
  }
  return frames;
}

std::vector<std::int64_t> parse_offsets(const unsigned char* bytes, std::size_t size, const std::string& path) {
  const Array array = parse_array(bytes, size, path, "<i8", sizeof(std::int64_t), 1);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(array.shape[0]));
  if (!offsets.empty()) std::memcpy(offsets.data(), bytes + array.begin, offsets.size() * sizeof(std::int64_t));
  return offsets;
}

void check_offsets(const std::vector<std::int64_t>& offsets, std::int64_t num_frames, const std::string& path) {
  if (offsets.size() < 2) fail(path, "offsets", "0 and the end of at least one clip", std::to_string(offsets.size()));
  if (offsets[0] != 0) fail(path, "offsets", "from 0 on", std::to_string(offsets[0]));
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] <= offsets[i - 1]) {
      fail(path, "offsets", "strictly increasing",
           std::to_string(offsets[i]) + " after " + std::to_string(offsets[i - 1]) + " at clip " + std::to_string(i - 1));
    }
  }
  if (offsets.back() != num_frames) {
    fail(path, "offsets", "up to the " + std::to_string(num_frames) + " frames there are", std::to_string(offsets.back()));
  }
}

}  // namespace fastskel
