// The two .npy files of a packed data set that native code reads, checked byte by byte before anything is believed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/clips.h"

namespace fastskel {

struct PackedFrames {
  std::size_t begin = 0;  // byte at which the values begin, a multiple of 16
  std::int64_t num_frames = 0;
  FrameShape shape;
};

// `size` bytes of frames.npy, (sum T, M, V, C) float32; only its header is read. Error names `path` and what is wrong
PackedFrames parse_frames(const unsigned char* bytes, std::size_t size, const std::string& path);

// `size` bytes of offsets.npy, (n + 1,) int64. Error names `path` and what is wrong
std::vector<std::int64_t> parse_offsets(const unsigned char* bytes, std::size_t size, const std::string& path);

// Error unless the offsets start at 0, increase strictly, and end at `num_frames`
void check_offsets(const std::vector<std::int64_t>& offsets, std::int64_t num_frames, const std::string& path);

}  // namespace fastskel
