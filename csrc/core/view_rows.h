// Work on rows of frames, compiled once per instruction set; every set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/clips.h"
#include "core/view.h"

namespace fastskel {

// floats that may be read and written behind the rows of a scratch buffer, so that whole vectors can be
constexpr std::int64_t kSlack = 64;
// rows made at once: few enough to stay in the nearest cache beside their clip
constexpr std::int64_t kBlockRows = 8;

struct Crop {
  std::int64_t start = 0, length = 0;
};

// rows `first` to `first + count` of a crop resized to `frames`
struct Rows {
  const float* clip;
  Crop crop;
  std::int64_t frames, first, count;
};

// key and counter of a sample's draws
struct DrawAddress {
  std::uint64_t seed;
  std::uint32_t index, step, view;
};

// kernels read from scratch buffers with slack, never from and to the same one; small structures come by value, so that no
// store can be thought to change them
struct RowKernels {
  const char* name;
  std::int64_t lanes;  // floats of the vectors that `multiply` works on
  // resized rows, and where their bodies have a coordinate that is not zero
  void (*resize)(Rows rows, FrameShape shape, float* out, std::uint8_t* mask);
  // the same, then times one matrix per joint, laid out by `lay_out_matrices`
  void (*resize_multiply)(Rows rows, FrameShape shape, const float* matrices, float* out,
                          std::uint8_t* mask);
  void (*multiply)(const float* rows, std::int64_t count, FrameShape shape, const float* matrices, float* out);
  // joint v becomes joint joints[v], channel 0 times sign
  void (*mirror)(const float* rows, std::int64_t count, FrameShape shape, const std::int32_t* joints, float sign,
                 float* out);
  // joint v less joint parents[v]
  void (*bones)(const float* rows, std::int64_t count, FrameShape shape, const std::int32_t* parents, float* out);
  void (*subtract)(const float* a, const float* b, std::int64_t size, float* out);
  // out = sum of weights[j] * taps[j], in ascending order
  void (*blur)(const float* const* taps, const float* weights, std::int64_t num_taps, std::int64_t size, float* out);
  // standard normals of words 4 * first_block on, four per block, a multiple of kNormalBlocks
  void (*normals)(const DrawAddress& address, std::uint32_t use, std::uint32_t first_block, std::int64_t num_blocks,
                  float* out);
  // x + std * normal for joints with a coordinate that is not zero
  void (*add_noise)(const float* rows, std::int64_t num_joints, std::int64_t channels, const float* normals, float std,
                    float* out);
  // conversion to the type of the batch, by DType; `fence` after the last one, before another thread may look
  void (*store[3])(const float* rows, std::int64_t size, void* out);
  void (*fence)();
};

constexpr std::int64_t kNormalBlocks = 16;

extern const RowKernels kBaselineRows;
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#endif

// the kernels in use: the widest that this processor has, unless others were selected
const RowKernels& row_kernels() noexcept;
// for tests: "avx512", "avx2" or "baseline"; false if this processor has it not
bool select_instructions(const char* name) noexcept;

// groups of joints in one vector, and the floats that the matrices of a frame's joints take when laid out
std::int64_t matrices_size(FrameShape shape, std::int64_t lanes) noexcept;
// matrices (V, C, C) as vectors: for every group of whole joints and input channel, the coefficient of each lane
void lay_out_matrices(const float* matrices, FrameShape shape, std::int64_t lanes, float* out) noexcept;

}  // namespace fastskel
