// What a sample's draws decide: its crop, its matrices, the weights of its blur.
#pragma once

#include <cstdint>
#include <vector>

#include "core/view.h"
#include "core/view_rows.h"

namespace fastskel {

// what a draw is for: part of its address (fastskel.philox.Use)
enum Use : std::uint32_t { kUseCrop = 1, kUseSpatial = 2, kUseJoints = 3, kUseNoise = 8, kUseFrames = 9 };

// words that one transform of a pipeline owns of SPATIAL and JOINTS, of NOISE, and of FRAMES
constexpr std::uint32_t kBlockWords = 64;
constexpr std::uint32_t kNoiseWords = 1u << 24;
constexpr std::uint32_t kFrameWords = 1u << 16;

// of the SPATIAL block, the words that transforms read
struct SpatialWords {
  std::uint32_t word[16];
};
SpatialWords spatial_words(const DrawAddress& address, std::uint32_t number) noexcept;
bool coin(const SpatialWords& words, float probability) noexcept;

Crop draw_crop(const ViewProgram& program, const DrawAddress& address, std::int64_t num_frames) noexcept;

// one matrix per joint (V, C, C) for row vectors, of a linear transform with its number in the pipeline; `pool` is scratch
void draw_matrices(const Transform& transform, const DrawAddress& address, std::uint32_t number, const FrameShape& shape,
                   std::vector<std::int64_t>& pool, float* out);
// first becomes the map `first` followed by `second`, (V, C, C) each
void compose_matrices(float* first, const float* second, const FrameShape& shape) noexcept;

// weights of the taps of a blur
void blur_weights(const Transform& blur, const SpatialWords& words, std::vector<double>& wide, float* out);

// the first `count` entries of `pool` become distinct members of range(n), one word each from `first_word` on
void draw_distinct(const DrawAddress& address, Use use, std::uint32_t first_word, std::int64_t count, std::int64_t n,
                   std::vector<std::int64_t>& pool);

}  // namespace fastskel
