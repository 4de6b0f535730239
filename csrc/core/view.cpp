#include "core/view.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <utility>

#include "core/philox.h"
#include "core/view_draws.h"
#include "core/view_normalise.h"
#include "core/view_rows.h"

namespace fastskel {
namespace {

using Kind = Transform::Kind;

// so that a crop of it can be drawn from one word
constexpr std::int64_t kClipFrameLimit = std::int64_t{1} << 30;

// a transform as it falls out for one sample; linear ones that follow each other are one
struct Step {
  enum class What { kMultiply, kMirror, kNoise, kBlur, kFrameMask, kBodyMask } what;
  const Transform* transform = nullptr;
  std::uint32_t number = 0;
  std::size_t begin = 0;  // of its matrices, weights or frames in their buffers
  std::int64_t body = 0;
};

// bytes fetched ahead per block of rows: four views of 64 frames fetch the longest clips of common data sets
constexpr std::ptrdiff_t kAheadBytes = 4096;
constexpr std::ptrdiff_t kLineBytes = 64;

// memory that begins with a cache line, so that vectors do not lie across two of them
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) noexcept {}
  T* allocate(std::size_t num) { return static_cast<T*>(::operator new(num * sizeof(T), std::align_val_t{kLineBytes})); }
  void deallocate(T* memory, std::size_t) noexcept { ::operator delete(memory, std::align_val_t{kLineBytes}); }
  bool operator==(const LineAllocator&) const noexcept { return true; }
  bool operator!=(const LineAllocator&) const noexcept { return false; }
};

using Floats = std::vector<float, LineAllocator<float>>;

float* reserve(Floats& buffer, std::int64_t size) {
  if (buffer.size() < static_cast<std::size_t>(size)) buffer.resize(static_cast<std::size_t>(size));
  return buffer.data();
}

}  // namespace

struct Scratch::Buffers {
  // the rows at work, twice because steps do not work in place
  Floats rows[2];
  Floats normals, weights, zeros, matrices, next, layout;
  std::vector<double> wide;
  std::vector<std::int64_t> pool;
  std::vector<std::uint8_t> masked;
  std::vector<const float*> taps;
  std::vector<Step> steps;

  // what is left of a clip to fetch ahead
  const char* ahead = nullptr;
  const char* ahead_end = nullptr;

  // the clip that was normalised last, and for what
  Floats clip;
  const Clips* clips = nullptr;
  const float* source = nullptr;
  std::int64_t centre_joint = 0;
  std::uint32_t epoch = 0;
  Normalise normalise = Normalise::kNone;
  std::array<double, 12> alignment{};
};

Scratch::Scratch() : buffers_(std::make_unique<Buffers>()) {}
Scratch::~Scratch() = default;
Scratch::Scratch(Scratch&&) noexcept = default;
Scratch& Scratch::operator=(Scratch&&) noexcept = default;

void Scratch::read_ahead(const ClipSpan& clip, const FrameShape& shape) noexcept {
  buffers_->ahead = reinterpret_cast<const char*>(clip.frames);
  buffers_->ahead_end = reinterpret_cast<const char*>(clip.frames + clip.num_frames * shape.size());
}

namespace {

void fetch_ahead(Scratch::Buffers& buffers) noexcept {
  const std::ptrdiff_t size = std::min(kAheadBytes, buffers.ahead_end - buffers.ahead);
  for (std::ptrdiff_t i = 0; i < size; i += kLineBytes) __builtin_prefetch(buffers.ahead + i, 0, 2);
  buffers.ahead += size;
}

// decides what a sample's draws make of the pipeline
void plan(const ViewProgram& program, const DrawAddress& address, const FrameShape& shape, std::int64_t lanes,
          Scratch::Buffers& buffers) {
  buffers.steps.clear();
  buffers.layout.clear();
  buffers.weights.clear();
  buffers.masked.clear();
  const std::size_t num = program.transforms.size();
  for (std::size_t i = 0; i < num; ++i) {
    const Transform& transform = program.transforms[i];
    const auto number = static_cast<std::uint32_t>(i);
    Step step{Step::What::kMultiply, &transform, number};
    if (transform.kind <= Kind::kOneOf) {
      const std::int64_t size = shape.joints * shape.channels * shape.channels;
      float* total = reserve(buffers.matrices, size);
      float* next = reserve(buffers.next, size);
      const bool follows = i > 0 && program.transforms[i - 1].kind <= Kind::kOneOf;
      draw_matrices(transform, address, number, shape, buffers.pool, follows ? next : total);
      if (follows) compose_matrices(total, next, shape);
      if (i + 1 < num && program.transforms[i + 1].kind <= Kind::kOneOf) continue;
      step.begin = buffers.layout.size();
      buffers.layout.resize(step.begin + static_cast<std::size_t>(matrices_size(shape, lanes)));
      lay_out_matrices(total, shape, lanes, buffers.layout.data() + step.begin);
      buffers.steps.push_back(step);
      continue;
    }
    const SpatialWords words = spatial_words(address, number);
    if (!coin(words, transform.probability)) continue;
    switch (transform.kind) {
      case Kind::kMirror: step.what = Step::What::kMirror; break;
      case Kind::kNoise: step.what = Step::What::kNoise; break;
      case Kind::kBlur:
        step.what = Step::What::kBlur;
        step.begin = buffers.weights.size();
        buffers.weights.resize(step.begin + static_cast<std::size_t>(transform.count));
        blur_weights(transform, words, buffers.wide, buffers.weights.data() + step.begin);
        break;
      case Kind::kFrameMask:
        step.what = Step::What::kFrameMask;
        step.begin = buffers.masked.size();
        buffers.masked.resize(step.begin + static_cast<std::size_t>(program.frames), 0);
        draw_distinct(address, kUseFrames, number * kFrameWords, transform.count, program.frames, buffers.pool);
        for (std::int64_t j = 0; j < transform.count; ++j) {
          buffers.masked[step.begin + static_cast<std::size_t>(buffers.pool[static_cast<std::size_t>(j)])] = 1;
        }
        break;
      default:
        if (shape.bodies == 1) continue;
        step.what = Step::What::kBodyMask;
        step.body = 1 + below(words.word[4], static_cast<std::uint32_t>(shape.bodies - 1));
        break;
    }
    buffers.steps.push_back(step);
  }
}

// applies steps to rows `first` to `first + count` of a view
class RowSteps {
 public:
  RowSteps(const RowKernels& kernels, const FrameShape& shape, const DrawAddress& address, Scratch::Buffers& buffers)
      : kernels_(kernels), shape_(shape), address_(address), buffers_(buffers) {}

  // from one of the buffers to the other, or in place: where the rows are afterwards
  float* apply(const Step& step, std::int64_t first, std::int64_t count, float* rows, float* other) {
    const std::int64_t size = shape_.size();
    switch (step.what) {
      case Step::What::kMultiply:
        kernels_.multiply(rows, count, shape_, buffers_.layout.data() + step.begin, other);
        return other;
      case Step::What::kMirror:
        kernels_.mirror(rows, count, shape_, step.transform->joints.data(), step.transform->flag ? -1.0f : 1.0f, other);
        return other;
      case Step::What::kNoise:
        add_noise(step, first, count, rows, other);
        return other;
      case Step::What::kBlur:
        blur(step, count, rows, other);
        return other;
      case Step::What::kFrameMask:
        for (std::int64_t row = 0; row < count; ++row) {
          const bool masked = buffers_.masked[step.begin + static_cast<std::size_t>(first + row)] != 0;
          if (masked) std::fill_n(rows + row * size, size, 0.0f);
        }
        return rows;
      case Step::What::kBodyMask:
        for (std::int64_t row = 0; row < count; ++row) {
          const std::int64_t body_size = shape_.joints * shape_.channels;
          std::fill_n(rows + row * size + step.body * body_size, body_size, 0.0f);
        }
        return rows;
    }
    return rows;
  }

 private:
  void add_noise(const Step& step, std::int64_t first, std::int64_t count, const float* rows, float* other) {
    // so that the first element of a block of rows is the first of its four words
    static_assert(kBlockRows % 4 == 0);
    const std::int64_t first_block = first * shape_.size() / 4, num_blocks = (count * shape_.size() + 3) / 4;
    const std::int64_t padded = (num_blocks + kNormalBlocks - 1) / kNormalBlocks * kNormalBlocks;
    float* normals = reserve(buffers_.normals, 4 * padded + kSlack);
    const auto block = step.number * (kNoiseWords / 4) + static_cast<std::uint32_t>(first_block);
    kernels_.normals(address_, kUseNoise, block, padded, normals);
    kernels_.add_noise(rows, count * shape_.bodies * shape_.joints, shape_.channels, normals,
                       step.transform->high, other);
  }

  // needs all rows of the view
  void blur(const Step& step, std::int64_t count, const float* rows, float* other) {
    const std::int64_t size = shape_.size(), num_taps = step.transform->count, half = num_taps / 2;
    buffers_.zeros.resize(static_cast<std::size_t>(size + kSlack));
    buffers_.taps.resize(static_cast<std::size_t>(num_taps));
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t j = 0; j < num_taps; ++j) {
        const std::int64_t from = row + j - half, inside = std::min(std::max<std::int64_t>(from, 0), count - 1);
        const bool zero = step.transform->zero_padding && from != inside;
        buffers_.taps[static_cast<std::size_t>(j)] = zero ? buffers_.zeros.data() : rows + inside * size;
      }
      kernels_.blur(buffers_.taps.data(), buffers_.weights.data() + step.begin, num_taps, size, other + row * size);
    }
  }

  const RowKernels& kernels_;
  const FrameShape& shape_;
  const DrawAddress& address_;
  Scratch::Buffers& buffers_;
};

}  // namespace

ClipSpan ViewMaker::normalised(std::int64_t number, const ClipSpan& source, std::uint32_t epoch,
                               Scratch::Buffers& buffers) const {
  const Normalise kind = program_.normalise;
  if (kind == Normalise::kNone) return source;
  std::array<double, 12> alignment{};
  if (kind == Normalise::kAlign) std::copy_n(program_.alignment.begin() + 12 * number, 12, alignment.begin());
  const bool same = buffers.clips == clips_ && buffers.source == source.frames &&
                    buffers.epoch == epoch && buffers.normalise == kind &&
                    buffers.centre_joint == program_.centre_joint &&
                    std::memcmp(buffers.alignment.data(), alignment.data(), sizeof alignment) == 0;
  if (!same) {
    reserve(buffers.clip, source.num_frames * clips_->shape().size());
    normalise_clip(source, clips_->shape(), kind, program_.centre_joint, alignment.data(), buffers.clip.data());
    buffers.clips = clips_;
    buffers.source = source.frames;
    buffers.epoch = epoch;
    buffers.normalise = kind;
    buffers.centre_joint = program_.centre_joint;
    buffers.alignment = alignment;
  }
  return {buffers.clip.data(), source.num_frames};
}

void ViewMaker::make(std::int64_t clip, std::uint32_t epoch, DType dtype, void* out, std::uint8_t* mask,
                     Scratch& scratch) const {
  const ClipSpan source = clips_->clip(clip);
  if (source.num_frames < 1 || source.num_frames > kClipFrameLimit) {
    throw Error("ViewMaker: clip must have 1 to 2**30 frames, got " + std::to_string(source.num_frames) + " in clip " +
                    std::to_string(clip) + ". Pack the data set again without it.",
                clip);
  }
  Scratch::Buffers& buffers = scratch.buffers();
  const RowKernels& kernels = row_kernels();
  const FrameShape& shape = clips_->shape();
  const ClipSpan span = normalised(clip, source, epoch, buffers);
  const DrawAddress address{seed_, static_cast<std::uint32_t>(clip), epoch, view_};
  const Crop crop = draw_crop(program_, address, span.num_frames);
  plan(program_, address, shape, kernels.lanes, buffers);

  const std::vector<Step>& steps = buffers.steps;
  const bool blurred =
      std::any_of(steps.begin(), steps.end(), [](const Step& step) { return step.what == Step::What::kBlur; });
  const bool multiplied = !steps.empty() && steps.front().what == Step::What::kMultiply;
  const std::int64_t frames = program_.frames, size = shape.size();
  // a blur looks at other rows, all else at its own, and motion at the next
  const std::int64_t block = blurred ? frames : std::min(frames, kBlockRows);
  float* first_rows = reserve(buffers.rows[0], (block + 1) * size + kSlack);
  float* other_rows = reserve(buffers.rows[1], (block + 1) * size + kSlack);
  RowSteps work(kernels, shape, address, buffers);
  for (std::int64_t first = 0; first < frames; first += block) {
    fetch_ahead(buffers);
    const std::int64_t count = std::min(block, frames - first);
    const std::int64_t made = program_.stream == Stream::kMotion && first + count < frames ? count + 1 : count;
    const Rows resized{span.frames, crop, frames, first, made};
    float* rows = first_rows;
    std::uint8_t* seen = mask + first * shape.bodies;
    if (multiplied) {
      kernels.resize_multiply(resized, shape, buffers.layout.data() + steps.front().begin, rows, seen);
    } else {
      kernels.resize(resized, shape, rows, seen);
    }
    for (std::size_t i = multiplied ? 1 : 0; i < steps.size(); ++i) {
      rows = work.apply(steps[i], first, made, rows, rows == first_rows ? other_rows : first_rows);
    }
    float* other = rows == first_rows ? other_rows : first_rows;
    if (program_.stream == Stream::kBone) {
      kernels.bones(rows, count, shape, program_.parents.data(), other);
      rows = other;
    } else if (program_.stream == Stream::kMotion) {
      kernels.subtract(rows + size, rows, (made - 1) * size, other);
      // the last frame stays where it is
      const float* last = rows + (count - 1) * size;
      if (made == count) kernels.subtract(last, last, size, other + (count - 1) * size);
      rows = other;
    }
    char* to = static_cast<char*>(out) + static_cast<std::size_t>(first * size) * size_of(dtype);
    kernels.store[static_cast<std::size_t>(dtype)](rows, count * size, to);
  }
  kernels.fence();
}

}  // namespace fastskel
