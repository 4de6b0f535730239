// Row kernels for processors with AVX2 and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include "core/view_rows.h"

#define FASTSKEL_TARGET __attribute__((target("avx2,f16c")))

namespace fastskel {
namespace {

// a window of this table, 8 - n entries on, masks the first n lanes
alignas(64) constexpr std::int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Lanes {
  using Floats = __m256;
  using Bits = std::uint32_t __attribute__((vector_size(32)));
  using Wide = std::uint64_t __attribute__((vector_size(32)));
  static constexpr std::int64_t kCount = 8;

  FASTSKEL_TARGET static inline Floats fill(float x) { return _mm256_set1_ps(x); }
  FASTSKEL_TARGET static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
  FASTSKEL_TARGET static inline Floats load_part(const float* p, std::int64_t num) {
    return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + kCount - num)));
  }
  template <std::int64_t kNum>
  FASTSKEL_TARGET static inline Floats load_joints(const float* p) {
    return kNum == kCount ? load(p) : load_part(p, kNum);
  }
  FASTSKEL_TARGET static inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  FASTSKEL_TARGET static inline void stream(float* p, Floats x) { _mm256_stream_ps(p, x); }

  FASTSKEL_TARGET static inline Bits no_bits() { return Bits{}; }
  FASTSKEL_TARGET static inline Bits bits(Floats x) { return reinterpret_cast<Bits>(x); }
  // whether any lane is other than +0 and -0
  FASTSKEL_TARGET static inline bool any_nonzero(Bits x) {
    return _mm256_testz_si256(reinterpret_cast<__m256i>(x), _mm256_set1_epi32(0x7FFFFFFF)) == 0;
  }

  FASTSKEL_TARGET static inline Floats root(Floats x) { return _mm256_sqrt_ps(x); }
  FASTSKEL_TARGET static inline Wide multiply_even(Wide x, std::uint32_t factor) {
    return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
  }

  // each lane's joint's channel kChannel
  template <int kChannels, int kChannel>
  FASTSKEL_TARGET static inline Floats expand(Floats x) {
    constexpr int c = kChannels, k = kChannel;
    const __m256i from = _mm256_setr_epi32(k, 1 / c * c + k, 2 / c * c + k, 3 / c * c + k, 4 / c * c + k, 5 / c * c + k,
                                           6 / c * c + k, 7 / c * c + k);
    return _mm256_permutevar8x32_ps(x, from);
  }

  using Halves = __m128i;
  // float16, to the nearest, halves to even
  FASTSKEL_TARGET static inline Halves halves(Floats x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
  // the lower halves of numbers below 2^16
  FASTSKEL_TARGET static inline Halves narrow(Bits x) {
    const auto wide = reinterpret_cast<__m256i>(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  FASTSKEL_TARGET static inline void store_halves(std::uint16_t* p, Halves x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
  }
  FASTSKEL_TARGET static inline void stream_halves(std::uint16_t* p, Halves x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), x);
  }

  static void fence() { _mm_sfence(); }
};

#include "core/view_rows_kernels.h"

}  // namespace

const RowKernels kAvx2Rows = kernels_named("avx2");

}  // namespace fastskel

#endif
