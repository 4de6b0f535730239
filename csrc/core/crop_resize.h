// Temporal crop and linear resize of a clip.
#pragma once

#include <cstdint>

namespace fastskel {

// Frames `start` to `start + length` of a clip (frames, frame_size), resized to (out_frames, frame_size).
// Half-pixel centres; the caller guarantees 0 <= start, 1 <= length, 1 <= out_frames, and start + length within the clip.
void crop_resize(const float* clip, std::int64_t frame_size, std::int64_t start, std::int64_t length,
                 std::int64_t out_frames, float* out) noexcept;

}  // namespace fastskel
