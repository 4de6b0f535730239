// Bytes that claim to be frames.npy and offsets.npy: refused with an Error, or read within their bounds.
// An input is the length of the first file (two bytes, low byte first), the first file, and the second.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/clips.h"
#include "core/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  std::size_t length = data[0] | static_cast<std::size_t>(data[1]) << 8;
  if (length > size - 2) length = size - 2;
  // memory of their own: a read past either end is then a fault
  const std::vector<unsigned char> frames_file(data + 2, data + 2 + length);
  const std::vector<unsigned char> offsets_file(data + 2 + length, data + size);
  try {
    const fastskel::PackedFrames packed = fastskel::parse_frames(frames_file.data(), frames_file.size(), "frames.npy");
    std::vector<std::int64_t> offsets =
        fastskel::parse_offsets(offsets_file.data(), offsets_file.size(), "offsets.npy");
    const auto* values = reinterpret_cast<const float*>(frames_file.data() + packed.begin);
    const fastskel::Clips clips =
        fastskel::Clips::borrow(values, packed.num_frames, packed.shape, std::move(offsets));
    std::int64_t num_frames = 0;
    volatile std::uint32_t sink = 0;
    for (std::int64_t number = 0; number < clips.size(); ++number) {
      const fastskel::ClipSpan clip = clips.clip(number);
      num_frames += clip.num_frames;
      const std::int64_t frame_size = clips.shape().size();
      for (const std::int64_t frame : {std::int64_t{0}, clip.num_frames - 1}) {
        for (std::int64_t i = 0; i < frame_size; ++i) {
          std::uint32_t word = 0;
          std::memcpy(&word, clip.frames + frame * frame_size + i, sizeof(word));
          sink = sink + word;
        }
      }
    }
    // what was accepted covers the file exactly
    if (num_frames != packed.num_frames) std::abort();
  } catch (const fastskel::Error&) {
  }
  return 0;
}
