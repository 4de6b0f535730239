// What a program and the clips it is made for must be.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "core/view.h"
#include "core/view_draws.h"

namespace fastskel {
namespace {

constexpr std::int64_t kOne = std::int64_t{1} << 24;
// keeps (2 i + 1) * length of the resize far from overflow
constexpr std::int64_t kFrameLimit = std::int64_t{1} << 30;
constexpr std::size_t kTransformLimit = 256;
// below this a sigma in frames is zero as float32 or its square as float64
constexpr float kSmallestSigma = 1e-6f;
constexpr std::int64_t kTapLimit = (std::int64_t{1} << 20) + 1;

void need(bool ok, const char* argument, const std::string& contract, const std::string& actual, const char* remedy) {
  if (!ok) throw Error("ViewMaker: " + std::string(argument) + " must be " + contract + ", got " + actual + ". " + remedy + ".");
}

void need_share(float share, const char* argument) {
  need(share >= 0.0f && share <= 1.0f, argument, "in [0, 1]", std::to_string(share), "Give a share");
}

void need_range(float low, float high, float least, const char* argument) {
  need(std::isfinite(low) && std::isfinite(high) && least <= low && low <= high, argument,
       least > 0.0f ? "finite, positive and low <= high" : "finite and low <= high",
       std::to_string(low) + ", " + std::to_string(high), "Give two numbers");
}

bool is_linear(Transform::Kind kind) {
  using Kind = Transform::Kind;
  return kind == Kind::kCorruption || kind == Kind::kShear || kind == Kind::kRotation || kind == Kind::kScaling ||
         kind == Kind::kJointMask || kind == Kind::kOneOf;
}

void check_transform(const Transform& transform) {
  using Kind = Transform::Kind;
  need_share(transform.probability, "probability");
  need(transform.count >= 0, "count", "at least 0", std::to_string(transform.count), "Give a number");
  switch (transform.kind) {
    case Kind::kCorruption:
    case Kind::kJointMask:
      need(transform.count <= kBlockWords, "count", "at most 64 joints", std::to_string(transform.count), "Choose fewer");
      break;
    case Kind::kFrameMask:
      need(transform.count <= kFrameWords, "count", "at most 65536 frames", std::to_string(transform.count), "Choose fewer");
      break;
    case Kind::kShear:
      need(std::isfinite(transform.high), "amplitude", "finite", std::to_string(transform.high), "Give a number");
      break;
    case Kind::kNoise:
      need(std::isfinite(transform.high), "std", "finite", std::to_string(transform.high), "Give a number");
      break;
    case Kind::kRotation:
      for (float angle : transform.angles) {
        need(std::isfinite(angle), "angles", "finite", std::to_string(angle), "Give radians");
      }
      break;
    case Kind::kScaling:
      need_range(transform.low, transform.high, std::numeric_limits<float>::lowest(), "low and high of scaling");
      break;
    case Kind::kBlur:
      need_range(transform.low, transform.high, kSmallestSigma, "low and high of blur");
      need(transform.count % 2 == 1 && transform.count <= kTapLimit, "taps", "odd and at most 2**20 + 1",
           std::to_string(transform.count), "Give an odd number");
      break;
    case Kind::kOneOf:
      need(!transform.options.empty() && transform.options.size() <= kTransformLimit, "options", "1 to 256 transforms",
           std::to_string(transform.options.size()), "List them");
      for (const Transform& option : transform.options) {
        need(is_linear(option.kind) && option.kind != Kind::kOneOf, "options", "linear transforms other than one-of",
             "another kind", "List them flat");
        check_transform(option);
      }
      break;
    case Kind::kMirror:
    case Kind::kBodyMask:
      break;
  }
}

void check_joints(const std::vector<std::int32_t>& joints, std::int64_t num_joints, const char* argument) {
  need(static_cast<std::int64_t>(joints.size()) == num_joints, argument, "one joint for each of " + std::to_string(num_joints),
       std::to_string(joints.size()), "Use the topology of the clips");
  for (std::int32_t joint : joints) {
    need(joint >= 0 && joint < num_joints, argument, "joints below " + std::to_string(num_joints), std::to_string(joint),
         "Use the topology of the clips");
  }
}

void check_fit(const Transform& transform, std::int64_t frames, const FrameShape& shape) {
  using Kind = Transform::Kind;
  const std::string count = std::to_string(transform.count);
  if (is_linear(transform.kind)) {
    need(shape.channels == 2 || shape.channels == 3, "channels", "2 or 3 for linear transforms",
         std::to_string(shape.channels), "Remove the transforms");
  }
  if (transform.kind == Kind::kCorruption || transform.kind == Kind::kJointMask) {
    need(transform.count <= shape.joints, "count", "at most the " + std::to_string(shape.joints) + " joints", count,
         "Choose fewer");
  }
  if (transform.kind == Kind::kFrameMask) {
    need(frames <= kFrameWords, "frames", "at most 65536 for a mask of frames", std::to_string(frames), "Shorten the view");
    need(transform.count <= frames, "count", "at most the " + std::to_string(frames) + " frames", count, "Choose fewer");
  }
  if (transform.kind == Kind::kNoise) {
    need(frames * shape.size() < kOne, "T M V C", "below 2**24 for noise", std::to_string(frames * shape.size()),
         "Shorten the view");
  }
  if (transform.kind == Kind::kMirror) check_joints(transform.joints, shape.joints, "joints of the mirror");
  for (const Transform& option : transform.options) check_fit(option, frames, shape);
}

}  // namespace

void check_program(const ViewProgram& program) {
  need(program.frames >= 1 && program.frames <= kFrameLimit, "frames", "in [1, 2**30]", std::to_string(program.frames),
       "Give the length of the view");
  const std::string shares = std::to_string(program.low) + ", " + std::to_string(program.high);
  if (program.random_crop) {
    need(0 <= program.low && program.low <= program.high && program.high <= kOne, "crop",
         "shares 0 <= low <= high <= 2**24", shares, "Give shares in units of 2**-24");
    need(program.min_frames >= 1, "min_frames", "at least 1", std::to_string(program.min_frames), "Keep a frame");
  } else {
    need(1 <= program.high && program.high <= kOne, "crop", "a share in [1, 2**24]", std::to_string(program.high),
         "Give a share in units of 2**-24");
  }
  need(program.centre_joint >= 0, "centre_joint", "at least 0", std::to_string(program.centre_joint), "Name a joint");
  need(program.transforms.size() <= kTransformLimit, "transforms", "at most 256", std::to_string(program.transforms.size()),
       "Remove some");
  for (const Transform& transform : program.transforms) check_transform(transform);
}

ViewMaker::ViewMaker(const Clips& clips, ViewProgram program, std::uint64_t seed, std::uint32_t view)
    : clips_(&clips), program_(std::move(program)), seed_(seed), view_(view) {
  check_program(program_);
  const FrameShape& shape = clips.shape();
  const std::string described =
      std::to_string(shape.bodies) + ", " + std::to_string(shape.joints) + ", " + std::to_string(shape.channels);
  need(shape.bodies >= 1 && shape.joints >= 1 && shape.channels >= 1, "frames of the clips", "(M, V, C) of at least 1",
       described, "Pack the data again");
  // every size of a view in bytes, with its slack, stays far below 2^63
  constexpr std::int64_t kElementLimit = std::int64_t{1} << 40;
  const bool fits = shape.bodies <= kElementLimit / shape.joints &&
                    shape.bodies * shape.joints <= kElementLimit / shape.channels &&
                    shape.size() <= kElementLimit / program_.frames;
  need(fits, "T M V C", "at most 2**40", std::to_string(program_.frames) + ", " + described, "Shorten the view");
  constexpr std::int64_t kIndexLimit = std::numeric_limits<std::int32_t>::max();
  need(shape.joints <= kIndexLimit && shape.bodies <= kIndexLimit, "M and V", "below 2**31", described, "Pack the data again");
  need(view < (1u << 16), "view", "below 2**16", std::to_string(view), "Number views from 0");
  need(clips.size() <= std::int64_t{1} << 32, "clips", "at most 2**32", std::to_string(clips.size()), "Split the data set");
  if (program_.normalise != Normalise::kNone) {
    need(program_.centre_joint < shape.joints, "centre_joint", "below " + std::to_string(shape.joints),
         std::to_string(program_.centre_joint), "Use the topology of the clips");
  }
  if (program_.normalise == Normalise::kAlign) {
    need(shape.channels == 3, "channels", "3 to align", std::to_string(shape.channels), "Use center for flat clips");
    need(static_cast<std::int64_t>(program_.alignment.size()) == 12 * clips.size(), "alignment",
         "(n, 4, 3) with n = " + std::to_string(clips.size()), std::to_string(program_.alignment.size()) + " numbers",
         "Make it for these clips");
  }
  if (program_.stream == Stream::kBone) check_joints(program_.parents, shape.joints, "parents");
  for (const Transform& transform : program_.transforms) check_fit(transform, program_.frames, shape);
}

}  // namespace fastskel
