// Row kernels in vectors of four floats, which every processor has (SSE2, NEON), and the choice among all kernels.
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "core/view_rows.h"

#define FASTSKEL_TARGET

namespace fastskel {
namespace {

struct Lanes {
  using Floats = float __attribute__((vector_size(16)));
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  using Wide = std::uint64_t __attribute__((vector_size(16)));
  static constexpr std::int64_t kCount = 4;

  static inline Floats fill(float x) { return Floats{x, x, x, x}; }
  static inline Floats load(const float* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static inline Floats load_part(const float* p, std::int64_t num) {
    return Floats{p[0], num > 1 ? p[1] : 0.0f, num > 2 ? p[2] : 0.0f, 0.0f};
  }
  template <std::int64_t kNum>
  static inline Floats load_joints(const float* p) {
    return kNum == kCount ? load(p) : Floats{p[0], p[1], p[2], 0.0f};
  }
  static inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

  static inline Bits no_bits() { return Bits{0, 0, 0, 0}; }
  static inline Bits bits(Floats x) { return reinterpret_cast<Bits>(x); }
  // whether any lane is other than +0 and -0
  static inline bool any_nonzero(Bits x) { return ((x[0] | x[1] | x[2] | x[3]) & 0x7FFFFFFFu) != 0; }

  // each lane's joint's channel kChannel
  template <int kChannels, int kChannel>
  static inline Floats expand(Floats x) {
    constexpr int c = kChannels, k = kChannel;
    return Floats{x[k], x[(1 / c * c + k) % 4], x[(2 / c * c + k) % 4], x[(3 / c * c + k) % 4]};
  }

  using Halves = std::uint16_t __attribute__((vector_size(8)));
  // the lower halves of numbers below 2^16
  static inline Halves narrow(Bits x) { return __builtin_convertvector(x, Halves); }
  static inline void store_halves(std::uint16_t* p, Halves x) { __builtin_memcpy(p, &x, sizeof x); }
  static inline void stream_halves(std::uint16_t* p, Halves x) { store_halves(p, x); }

  // float16, to the nearest, halves to even
  static inline Halves halves(Floats x) {
    const Bits sign = (bits(x) >> 16) & 0x8000u, size = bits(x) & 0x7FFFFFFFu;
    const Bits normal = (size - (112u << 23) + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    // in the sum with 1/2 the last bit has the weight of a half's smallest number
    const Bits subnormal = bits(reinterpret_cast<Floats>(size) + 0.5f) - 0x3F000000u;
    const Bits is_small = reinterpret_cast<Bits>(size < 0x38800000u), is_large = reinterpret_cast<Bits>(size >= 0x477FF000u);
    const Bits is_nan = reinterpret_cast<Bits>(size > 0x7F800000u);
    const Bits special = 0x7C00u | (is_nan & (0x200u | ((size >> 13) & 0x3FFu)));
    return narrow(sign | (is_large & special) | (is_small & subnormal) | (~is_large & ~is_small & normal));
  }

#if defined(__x86_64__)
  static inline Floats root(Floats x) { return _mm_sqrt_ps(x); }
  static inline Wide multiply_even(Wide x, std::uint32_t factor) {
    return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(factor)));
  }
  static inline void stream(float* p, Floats x) { _mm_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }
#else
  static inline Floats root(Floats x) {
    return Floats{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
  }
  static inline Wide multiply_even(Wide x, std::uint32_t factor) { return (x & 0xFFFFFFFFu) * factor; }
  static inline void stream(float* p, Floats x) { store(p, x); }
  static void fence() {}
#endif
};

#include "core/view_rows_kernels.h"

#if defined(__x86_64__)
bool has_f16c() noexcept {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const RowKernels* kernels_of(const char* name) noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name == nullptr || std::strcmp(name, "avx512") == 0)) return &kAvx512Rows;
  if (avx2 && (name == nullptr || std::strcmp(name, "avx2") == 0)) return &kAvx2Rows;
#endif
  return name == nullptr || std::strcmp(name, "baseline") == 0 ? &kBaselineRows : nullptr;
}

std::atomic<const RowKernels*>& selected() noexcept {
  static std::atomic<const RowKernels*> kernels{kernels_of(nullptr)};
  return kernels;
}

}  // namespace

const RowKernels kBaselineRows = kernels_named("baseline");

const RowKernels& row_kernels() noexcept { return *selected().load(std::memory_order_relaxed); }

bool select_instructions(const char* name) noexcept {
  const RowKernels* kernels = kernels_of(name);
  if (kernels != nullptr) selected().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

std::int64_t matrices_size(FrameShape shape, std::int64_t lanes) noexcept {
  const std::int64_t joints = lanes / shape.channels;
  return (shape.joints + joints - 1) / joints * shape.channels * lanes;
}

void lay_out_matrices(const float* matrices, FrameShape shape, std::int64_t lanes, float* out) noexcept {
  const std::int64_t channels = shape.channels, joints = lanes / channels;
  std::memset(out, 0, static_cast<std::size_t>(matrices_size(shape, lanes)) * sizeof(float));
  for (std::int64_t first = 0; first < shape.joints; first += joints, out += channels * lanes) {
    const std::int64_t num = shape.joints - first < joints ? shape.joints - first : joints;
    for (std::int64_t joint = 0; joint < num; ++joint) {
      const float* matrix = matrices + (first + joint) * channels * channels;
      for (std::int64_t row = 0; row < channels; ++row) {
        for (std::int64_t column = 0; column < channels; ++column) {
          out[row * lanes + joint * channels + column] = matrix[row * channels + column];
        }
      }
    }
  }
}

}  // namespace fastskel
