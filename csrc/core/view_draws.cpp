#include "core/view_draws.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

#include "core/philox.h"

namespace fastskel {
namespace {

// C x C matrices are read and written in the corner of 3 x 3 ones, row by row
struct Matrix {
  float at[3][3] = {{1.0f, 0.0f, 0.0f}, {0.0f, 1.0f, 0.0f}, {0.0f, 0.0f, 1.0f}};
};

// sums in ascending order of the inner channel
Matrix product(const Matrix& a, const Matrix& b, std::int64_t channels) noexcept {
  Matrix out;
  for (std::int64_t i = 0; i < channels; ++i) {
    for (std::int64_t j = 0; j < channels; ++j) {
      float sum = a.at[i][0] * b.at[0][j];
      for (std::int64_t k = 1; k < channels; ++k) sum = sum + a.at[i][k] * b.at[k][j];
      out.at[i][j] = sum;
    }
  }
  return out;
}

void write(const Matrix& matrix, std::int64_t channels, float* out) noexcept {
  for (std::int64_t i = 0; i < channels; ++i) {
    for (std::int64_t j = 0; j < channels; ++j) *out++ = matrix.at[i][j];
  }
}

Matrix read(const float* matrix, std::int64_t channels) noexcept {
  Matrix out;
  for (std::int64_t i = 0; i < channels; ++i) {
    for (std::int64_t j = 0; j < channels; ++j) out.at[i][j] = *matrix++;
  }
  return out;
}

Matrix turn(float angle, int first, int second) noexcept {
  const auto wide = static_cast<double>(angle);
  const auto sine = static_cast<float>(std::sin(wide)), cosine = static_cast<float>(std::cos(wide));
  Matrix out;
  out.at[first][first] = out.at[second][second] = cosine;
  out.at[first][second] = -sine;
  out.at[second][first] = sine;
  return out;
}

Matrix rotation(const Transform& transform, const SpatialWords& words, std::int64_t channels) noexcept {
  float angles[3];
  for (int axis = 0; axis < 3; ++axis) angles[axis] = transform.angles[axis] * symmetric(words.word[4 + axis]);
  const Matrix z = turn(angles[2], 0, 1);
  if (channels == 2) return z;
  return product(product(turn(angles[0], 1, 2), turn(angles[1], 2, 0), channels), z, channels);
}

Matrix shear(float amplitude, const SpatialWords& words) noexcept {
  // a, b, c, d, e, f of S = [[1, a, b], [c, 1, d], [e, f, 1]], transposed for row vectors
  constexpr int kPlaces[6][2] = {{0, 1}, {0, 2}, {1, 0}, {1, 2}, {2, 0}, {2, 1}};
  Matrix out;
  for (int i = 0; i < 6; ++i) out.at[kPlaces[i][1]][kPlaces[i][0]] = symmetric(words.word[4 + i]) * amplitude;
  return out;
}

Matrix scaling(const Transform& transform, const SpatialWords& words) noexcept {
  Matrix out;
  for (int axis = 0; axis < 3; ++axis) {
    const float share = uniform(words.word[4 + (transform.flag ? axis : 0)]);
    out.at[axis][axis] = transform.low + (transform.high - transform.low) * share;
  }
  return out;
}

Matrix mix(const SpatialWords& words) noexcept {
  Matrix out;
  for (int i = 0; i < 9; ++i) out.at[i / 3][i % 3] = symmetric(words.word[4 + i]);
  return out;
}

}  // namespace

SpatialWords spatial_words(const DrawAddress& address, std::uint32_t number) noexcept {
  SpatialWords words;
  philox_words(address.seed, address.index, address.step, address.view, kUseSpatial, 16, words.word,
               number * (kBlockWords / 4));
  return words;
}

bool coin(const SpatialWords& words, float probability) noexcept { return uniform(words.word[1]) < probability; }

Crop draw_crop(const ViewProgram& program, const DrawAddress& address, std::int64_t num_frames) noexcept {
  if (!program.random_crop) {
    const std::int64_t start = (num_frames * ((std::int64_t{1} << 24) - program.high)) >> 25;
    return {start, num_frames - 2 * start};
  }
  std::uint32_t words[2];
  philox_words(address.seed, address.index, address.step, address.view, kUseCrop, 2, words);
  const std::int64_t scale = program.low + (((program.high - program.low) * static_cast<std::int64_t>(words[0] >> 8)) >> 24);
  const std::int64_t length = std::min(std::max((num_frames * scale) >> 24, program.min_frames), num_frames);
  return {static_cast<std::int64_t>(below(words[1], static_cast<std::uint32_t>(num_frames - length + 1))), length};
}

void draw_distinct(const DrawAddress& address, Use use, std::uint32_t first_word, std::int64_t count, std::int64_t n,
                   std::vector<std::int64_t>& pool) {
  pool.resize(static_cast<std::size_t>(n));
  std::iota(pool.begin(), pool.end(), std::int64_t{0});
  std::uint32_t words[4];
  for (std::int64_t j = 0; j < count; ++j) {
    if (j % 4 == 0) {
      philox_words(address.seed, address.index, address.step, address.view, use, 4, words,
                   first_word / 4 + static_cast<std::uint32_t>(j / 4));
    }
    const std::int64_t other = j + below(words[j % 4], static_cast<std::uint32_t>(n - j));
    std::swap(pool[static_cast<std::size_t>(j)], pool[static_cast<std::size_t>(other)]);
  }
}

void draw_matrices(const Transform& transform, const DrawAddress& address, std::uint32_t number, const FrameShape& shape,
                   std::vector<std::int64_t>& pool, float* out) {
  using Kind = Transform::Kind;
  const SpatialWords words = spatial_words(address, number);
  const bool one_of = transform.kind == Kind::kOneOf;
  const Transform& chosen =
      one_of ? transform.options[below(words.word[0], static_cast<std::uint32_t>(transform.options.size()))] : transform;
  const bool applied = coin(words, chosen.probability);
  // what becomes of all joints, and of those that are drawn
  Matrix all, some;
  switch (chosen.kind) {
    case Kind::kCorruption: some = applied ? Matrix{{{0.0f}}} : mix(words); break;
    case Kind::kJointMask: if (applied) some = Matrix{{{0.0f}}}; break;
    case Kind::kShear: all = shear(chosen.high, words); break;
    case Kind::kRotation: if (applied) all = rotation(chosen, words, shape.channels); break;
    case Kind::kScaling: if (applied) all = scaling(chosen, words); break;
    default: break;
  }
  const std::int64_t size = shape.channels * shape.channels;
  for (std::int64_t joint = 0; joint < shape.joints; ++joint) write(all, shape.channels, out + joint * size);
  if (chosen.kind == Kind::kCorruption || chosen.kind == Kind::kJointMask) {
    draw_distinct(address, kUseJoints, number * kBlockWords, chosen.count, shape.joints, pool);
    for (std::int64_t i = 0; i < chosen.count; ++i) write(some, shape.channels, out + pool[static_cast<std::size_t>(i)] * size);
  }
}

void compose_matrices(float* first, const float* second, const FrameShape& shape) noexcept {
  const std::int64_t size = shape.channels * shape.channels;
  for (std::int64_t joint = 0; joint < shape.joints; ++joint, first += size, second += size) {
    write(product(read(first, shape.channels), read(second, shape.channels), shape.channels), shape.channels, first);
  }
}

void blur_weights(const Transform& blur, const SpatialWords& words, std::vector<double>& wide, float* out) {
  const auto sigma = static_cast<double>(blur.low + (blur.high - blur.low) * uniform(words.word[4]));
  wide.resize(static_cast<std::size_t>(blur.count));
  double total = 0.0;
  for (std::int64_t j = 0; j < blur.count; ++j) {
    const auto offset = static_cast<double>(j - blur.count / 2);
    const double weight = std::exp(-(offset * offset) / (2.0 * (sigma * sigma)));
    wide[static_cast<std::size_t>(j)] = weight;
    total += weight;
  }
  for (double weight : wide) *out++ = static_cast<float>(blur.flag ? weight / total : weight);
}

}  // namespace fastskel
