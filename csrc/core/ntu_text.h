// The text format of NTU RGB+D skeletons, one recording per file.
//
//   number of frames
//   for each frame: number of bodies
//   for each body:  body id, 9 numbers of the tracker
//                   number of joints
//     for each joint: x, y, z, depth x, y, colour x, y, orientation w, x, y, z, tracking state
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastskel {

// hand confidences and states, lean and tracking state of a body
constexpr std::size_t kNtuBodyValues = 9;
constexpr std::size_t kNtuJointValues = 12;
constexpr std::size_t kNtuCoordinates = 3;

struct NtuText {
  std::vector<std::int64_t> num_bodies;  // (T,)
  // one entry per body and frame, in the order of the file: B is the sum of num_bodies
  std::vector<std::int64_t> ids;  // (B,)
  std::vector<float> trackers;    // (B, 9)
  std::vector<float> joints;      // (B, V, 3 or 12)
};

// text that is not in the format: "line 4 must be ..., got ...", lines counted from 1
struct NtuError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Reads a file of bodies with `num_joints` joints each, at least 1; keeps the coordinates of a joint, or all its values.
// Every number is checked and read exactly: rounded to a double, then to a float, as numpy.float32(float(text)) is.
// Blank lines, blanks around numbers and carriage returns are passed over. Memory stays in proportion to the size.
NtuText parse_ntu(const char* text, std::size_t size, std::size_t num_joints, bool all_values);

}  // namespace fastskel
