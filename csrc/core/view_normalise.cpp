#include "core/view_normalise.h"

#include <cmath>

namespace fastskel {
namespace {

bool is_present(const float* joint, std::int64_t channels) noexcept {
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    if (joint[channel] != 0.0f) return true;
  }
  return false;
}

// one frame's joints less `shift`, absent ones times zero
void shift_frame(const float* frame, const float* shift, std::int64_t num_joints, std::int64_t channels,
                 float* out) noexcept {
  for (std::int64_t joint = 0; joint < num_joints; ++joint, frame += channels, out += channels) {
    const float present = is_present(frame, channels) ? 1.0f : 0.0f;
    for (std::int64_t channel = 0; channel < channels; ++channel) out[channel] = (frame[channel] - shift[channel]) * present;
  }
}

void center_clip(const ClipSpan& clip, const FrameShape& shape, std::int64_t centre_joint, bool per_frame,
                 float* out) noexcept {
  const std::int64_t channels = shape.channels, size = shape.size();
  const float* centre = clip.frames + centre_joint * channels;
  std::int64_t first = 0;
  while (first < clip.num_frames && !is_present(centre + first * size, channels)) ++first;
  // where the centre is absent its last known position holds, and before it is first seen that one
  const float* shift = centre + (first < clip.num_frames ? first : 0) * size;
  for (std::int64_t t = 0; t < clip.num_frames; ++t) {
    const float* own = centre + t * size;
    if (per_frame && is_present(own, channels)) shift = own;
    shift_frame(clip.frames + t * size, shift, shape.bodies * shape.joints, channels, out + t * size);
  }
}

void align_clip(const ClipSpan& clip, const FrameShape& shape, const double* alignment, float* out) noexcept {
  const double* origin = alignment;
  const double* rotation = alignment + 3;
  const std::int64_t num_joints = clip.num_frames * shape.bodies * shape.joints;
  const float* x = clip.frames;
  for (std::int64_t joint = 0; joint < num_joints; ++joint, x += 3, out += 3) {
    const double present = is_present(x, 3) ? 1.0 : 0.0;
    double d[3];
    for (int channel = 0; channel < 3; ++channel) d[channel] = static_cast<double>(x[channel]) - origin[channel];
    for (int axis = 0; axis < 3; ++axis) {
      const double* row = rotation + 3 * axis;
      out[axis] = static_cast<float>(((d[0] * row[0] + d[1] * row[1]) + d[2] * row[2]) * present);
    }
  }
}

}  // namespace

void normalise_clip(const ClipSpan& clip, const FrameShape& shape, Normalise kind, std::int64_t centre_joint,
                    const double* alignment, float* out) noexcept {
  if (kind == Normalise::kAlign && !std::isnan(alignment[0])) {
    align_clip(clip, shape, alignment, out);
  } else {
    center_clip(clip, shape, centre_joint, kind == Normalise::kCenter, out);
  }
}

}  // namespace fastskel
