// Normalisations of a whole clip, as fastskel.data.normalise defines them.
#pragma once

#include <cstdint>

#include "core/clips.h"
#include "core/view.h"

namespace fastskel {

// `alignment` is the clip's origin and rotation (4, 3), read by kAlign alone; writes (T, M, V, C)
void normalise_clip(const ClipSpan& clip, const FrameShape& shape, Normalise kind, std::int64_t centre_joint,
                    const double* alignment, float* out) noexcept;

}  // namespace fastskel
