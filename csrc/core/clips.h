// The clips of a packed data set: a memory map of its files, or memory that somebody else holds.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastskel {

// what a caller can be told about: `clip` is the number of the clip at fault, or -1
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, std::int64_t clip_number = -1)
      : std::runtime_error(message), clip(clip_number) {}
  std::int64_t clip;
};

struct FrameShape {
  std::int64_t bodies = 0, joints = 0, channels = 0;
  std::int64_t size() const noexcept { return bodies * joints * channels; }
};

struct ClipSpan {
  const float* frames;  // (num_frames, bodies, joints, channels)
  std::int64_t num_frames;
};

class Clips {
 public:
  // maps frames.npy, (sum T, M, V, C) float32, and reads offsets.npy, (n + 1,) int64; Error names the file that is not as
  // it must be
  static Clips open(const std::string& frames_path, const std::string& offsets_path);
  // frames must outlive the object; Error if the offsets do not fit them
  static Clips borrow(const float* frames, std::int64_t num_frames, FrameShape shape, std::vector<std::int64_t> offsets);

  std::int64_t size() const noexcept { return static_cast<std::int64_t>(offsets_.size()) - 1; }
  const FrameShape& shape() const noexcept { return shape_; }
  // Error if there is no clip of that number
  ClipSpan clip(std::int64_t number) const;
  // Error if the mapped file has become shorter than it was; what is cut off between this call and a read still ends the process
  void check_unchanged() const;
  // asks the system to read a clip of a mapped file ahead. Clips are read in random order, each from end to end: advice
  // for the whole file would fit neither (random reads page by page, sequential reads what nobody wants)
  void prefetch(std::int64_t number) const noexcept;

 private:
  Clips() = default;
  struct Map;
  std::shared_ptr<const Map> map_;  // none for borrowed memory
  const float* frames_ = nullptr;
  FrameShape shape_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace fastskel
