// One view of one clip: normalise, crop, resize, transform, derive the stream, convert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/clips.h"

namespace fastskel {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline std::size_t size_of(DType dtype) noexcept { return dtype == DType::kFloat32 ? 4 : 2; }

struct Transform {
  enum class Kind {
    kCorruption, kShear, kRotation, kScaling, kJointMask, kOneOf,  // one matrix per sample and joint
    kMirror, kNoise, kBlur, kFrameMask, kBodyMask
  };
  Kind kind = Kind::kShear;
  float probability = 1.0f;           // of the transform; of zeros for kCorruption
  std::int64_t count = 0;             // joints, frames, or taps of the blur
  float low = 0.0f, high = 0.0f;      // bounds; amplitude of the shear and std of the noise are `high`
  float angles[3] = {0.0f, 0.0f, 0.0f};
  bool flag = false;                  // per_axis, reflect, normalise
  bool zero_padding = false;          // of the blur; else the end frames are repeated
  std::vector<std::int32_t> joints;   // of the mirror
  std::vector<Transform> options;     // of one-of
};

enum class Normalise { kNone, kCenter, kCenterFirst, kAlign };
enum class Stream { kJoint, kBone, kMotion };

struct ViewProgram {
  std::int64_t frames = 0;            // T
  bool random_crop = false;
  std::int64_t low = 0, high = 0;     // shares of a random crop in units of 2^-24; `high` is the ratio of a centre crop
  std::int64_t min_frames = 1;
  Normalise normalise = Normalise::kNone;
  std::int64_t centre_joint = 0;
  std::vector<double> alignment;      // (n, 4, 3): origin and rotation of each clip; a NaN origin centres the clip instead
  std::vector<Transform> transforms;
  Stream stream = Stream::kJoint;
  std::vector<std::int32_t> parents;  // (V,) for bones
};

// buffers of one thread, which also keep the clip that was normalised last for its next view in the same epoch; not to be
// used for other clips once those of its makers are gone
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(Scratch&&) noexcept;
  Scratch& operator=(Scratch&&) noexcept;
  // makes the processor fetch a clip that will be needed soon, a little with every block of rows that is made meanwhile
  void read_ahead(const ClipSpan& clip, const FrameShape& shape) noexcept;
  struct Buffers;
  Buffers& buffers() noexcept { return *buffers_; }

 private:
  std::unique_ptr<Buffers> buffers_;
};

// Error unless the numbers of a program are in their ranges, whatever the clips
void check_program(const ViewProgram& program);

class ViewMaker {
 public:
  // Error if the program does not fit the clips (joints, bodies, channels, lengths of its tables)
  ViewMaker(const Clips& clips, ViewProgram program, std::uint64_t seed, std::uint32_t view);

  std::int64_t frames() const noexcept { return program_.frames; }
  // elements of one view, T M V C, and of its mask, T M
  std::int64_t size() const noexcept { return program_.frames * clips_->shape().size(); }
  std::int64_t mask_size() const noexcept { return program_.frames * clips_->shape().bodies; }
  // writes (T, M, V, C) to out and (T, M) of 0 and 1 to mask; Error with the clip's number; reads nothing that changes, so that
  // threads may call it at once, each with a scratch of its own
  void make(std::int64_t clip, std::uint32_t epoch, DType dtype, void* out, std::uint8_t* mask, Scratch& scratch) const;

 private:
  ClipSpan normalised(std::int64_t number, const ClipSpan& source, std::uint32_t epoch, Scratch::Buffers& buffers) const;

  const Clips* clips_;  // outlives the maker
  ViewProgram program_;
  std::uint64_t seed_;
  std::uint32_t view_;
};

}  // namespace fastskel
