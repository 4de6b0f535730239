#include "core/crop_resize.h"

#include <algorithm>

namespace fastskel {

void crop_resize(const float* clip, std::int64_t frame_size, std::int64_t start, std::int64_t length,
                 std::int64_t out_frames, float* out) noexcept {
  // source position of frame i is (2 i + 1) length / (2 out) - 1 / 2: a whole numerator picks the same frames everywhere
  const std::int64_t denominator = 2 * out_frames;
  for (std::int64_t i = 0; i < out_frames; ++i) {
    const std::int64_t numerator = std::max<std::int64_t>((2 * i + 1) * length - out_frames, 0);
    const std::int64_t lower = numerator / denominator;
    const std::int64_t upper = std::min(lower + 1, length - 1);
    const auto weight =
        static_cast<float>(static_cast<double>(numerator % denominator) / static_cast<double>(denominator));
    const float rest = 1.0f - weight;
    const float* a = clip + (start + lower) * frame_size;
    const float* b = clip + (start + upper) * frame_size;
    float* y = out + i * frame_size;
    for (std::int64_t j = 0; j < frame_size; ++j) y[j] = rest * a[j] + weight * b[j];
  }
}

}  // namespace fastskel
