// Views read nothing outside of their clip and write nothing outside of their place: around both lie pages that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/view.h"
#include "core/view_rows.h"

namespace fastskel_tests {

namespace {

using fastskel::Clips;
using fastskel::DType;
using fastskel::FrameShape;
using fastskel::Transform;
using fastskel::ViewProgram;
using Kind = Transform::Kind;

// memory that begins or ends at a forbidden page
class Guarded {
 public:
  Guarded(std::size_t bytes, bool at_end) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t body = (bytes + page - 1) / page * page;
    size_ = body + 2 * page;
    void* memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "memory for a guarded buffer");
    begin_ = static_cast<unsigned char*>(memory);
    ::mprotect(begin_, page, PROT_NONE);
    ::mprotect(begin_ + page + body, page, PROT_NONE);
    data_ = begin_ + page + (at_end ? body - bytes : 0);
  }
  ~Guarded() { ::munmap(begin_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() const noexcept { return data_; }

 private:
  unsigned char* begin_ = nullptr;
  unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

class Draws {
 public:
  std::int64_t between(std::int64_t low, std::int64_t high) { return low + random_() % (high - low + 1); }
  bool one_in(std::int64_t num) { return between(1, num) == 1; }

  std::vector<std::int32_t> joints(std::int64_t num) {
    std::vector<std::int32_t> made;
    for (std::int64_t i = 0; i < num; ++i) made.push_back(static_cast<std::int32_t>(between(0, num - 1)));
    return made;
  }

  Transform transform(Kind kind, const FrameShape& shape, std::int64_t frames) {
    Transform made;
    made.kind = kind;
    made.probability = one_in(2) ? 1.0f : 0.5f;
    made.low = 0.5f;
    made.high = 1.5f;
    made.angles[0] = made.angles[1] = made.angles[2] = 1.0f;
    made.flag = one_in(2);
    made.zero_padding = one_in(2);
    if (kind == Kind::kCorruption || kind == Kind::kJointMask) made.count = between(0, shape.joints);
    if (kind == Kind::kBlur) made.count = 2 * between(0, 8) + 1;
    if (kind == Kind::kFrameMask) made.count = between(0, frames);
    if (kind == Kind::kMirror) made.joints = joints(shape.joints);
    if (kind == Kind::kOneOf) {
      made.options = {transform(Kind::kCorruption, shape, frames), transform(Kind::kShear, shape, frames)};
    }
    return made;
  }

  ViewProgram program(const FrameShape& shape) {
    ViewProgram made;
    made.frames = between(1, 20);
    made.random_crop = one_in(2);
    made.high = 1 << 24;
    made.min_frames = between(1, 40);
    made.normalise = static_cast<fastskel::Normalise>(between(0, 2));
    made.centre_joint = between(0, shape.joints - 1);
    made.stream = static_cast<fastskel::Stream>(between(0, 2));
    made.parents = joints(shape.joints);
    const bool linear = shape.channels == 2 || shape.channels == 3;
    const auto first = static_cast<std::int64_t>(linear ? Kind::kCorruption : Kind::kMirror);
    for (std::int64_t i = between(0, 4); i > 0; --i) {
      const auto kind = static_cast<Kind>(between(first, static_cast<std::int64_t>(Kind::kBodyMask)));
      made.transforms.push_back(transform(kind, shape, made.frames));
    }
    return made;
  }

  float coordinate() {
    constexpr float kOdd[] = {std::numeric_limits<float>::infinity(), 3e38f, -1e-40f, -0.0f, 1e-45f};
    if (one_in(40)) return kOdd[between(0, 4)];
    return one_in(9) ? 0.0f : static_cast<float>(between(-1000, 1000)) / 77.0f;
  }

 private:
  std::minstd_rand random_{5};
};

// which NaN it is depends on the order of operands
std::vector<float> without_nans(const unsigned char* memory, std::int64_t size) {
  std::vector<float> values(static_cast<std::size_t>(size));
  std::memcpy(values.data(), memory, values.size() * sizeof(float));
  for (float& value : values) value = std::isnan(value) ? 12345.0f : value;
  return values;
}

}  // namespace

void test_bounds() {
  Draws draws;
  for (int round = 0; round < 1500; ++round) {
    const bool few = draws.one_in(4);
    const FrameShape shape{draws.between(1, 3), draws.between(1, few ? 3 : 33), draws.between(1, draws.one_in(3) ? 9 : 3)};
    const std::int64_t length = draws.one_in(3) ? 1 : draws.between(2, 30);
    const Guarded frames(static_cast<std::size_t>(length * shape.size()) * sizeof(float), draws.one_in(2));
    auto* coordinates = reinterpret_cast<float*>(frames.data());
    for (std::int64_t i = 0; i < length * shape.size(); ++i) coordinates[i] = draws.coordinate();
    const Clips clips = Clips::borrow(coordinates, length, shape, {0, length});
    const fastskel::ViewMaker maker(clips, draws.program(shape), 11, 3);
    std::vector<float> first;
    for (const char* instructions : {"baseline", "avx2", "avx512"}) {
      if (!fastskel::select_instructions(instructions)) continue;
      for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
        const Guarded out(static_cast<std::size_t>(maker.size()) * fastskel::size_of(dtype), draws.one_in(2));
        const Guarded mask(static_cast<std::size_t>(maker.mask_size()), draws.one_in(2));
        fastskel::Scratch scratch;
        maker.make(0, 2, dtype, out.data(), mask.data(), scratch);
        if (dtype != DType::kFloat32) continue;
        const std::vector<float> made = without_nans(out.data(), maker.size());
        if (first.empty()) first = made;
        check(std::memcmp(made.data(), first.data(), made.size() * sizeof(float)) == 0,
              "bits of " + std::string(instructions) + " in round " + std::to_string(round));
      }
    }
  }
  fastskel::select_instructions(nullptr);
}

}  // namespace fastskel_tests
