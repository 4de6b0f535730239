// Row kernels for processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#if !defined(__clang__)
// the headers of GCC 12 leave lanes undefined on purpose and are warned about where they are inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "core/view_rows.h"

#define FASTSKEL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace fastskel {
namespace {

struct Lanes {
  using Floats = __m512;
  using Bits = std::uint32_t __attribute__((vector_size(64)));
  using Wide = std::uint64_t __attribute__((vector_size(64)));
  static constexpr std::int64_t kCount = 16;

  FASTSKEL_TARGET static inline Floats fill(float x) { return _mm512_set1_ps(x); }
  FASTSKEL_TARGET static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
  FASTSKEL_TARGET static inline Floats load_part(const float* p, std::int64_t num) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << num) - 1u), p);
  }
  template <std::int64_t kNum>
  FASTSKEL_TARGET static inline Floats load_joints(const float* p) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << kNum) - 1u), p);
  }
  FASTSKEL_TARGET static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  FASTSKEL_TARGET static inline void stream(float* p, Floats x) { _mm512_stream_ps(p, x); }

  FASTSKEL_TARGET static inline Bits no_bits() { return Bits{}; }
  FASTSKEL_TARGET static inline Bits bits(Floats x) { return reinterpret_cast<Bits>(x); }
  // whether any lane is other than +0 and -0
  FASTSKEL_TARGET static inline bool any_nonzero(Bits x) {
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), _mm512_set1_epi32(0x7FFFFFFF)) != 0;
  }

  FASTSKEL_TARGET static inline Floats root(Floats x) { return _mm512_sqrt_ps(x); }
  FASTSKEL_TARGET static inline Wide multiply_even(Wide x, std::uint32_t factor) {
    return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
  }

  // each lane's joint's channel kChannel
  template <int kChannels, int kChannel>
  FASTSKEL_TARGET static inline Floats expand(Floats x) {
    constexpr int c = kChannels, k = kChannel;
    const __m512i from = _mm512_setr_epi32(k, 1 / c * c + k, 2 / c * c + k, 3 / c * c + k, 4 / c * c + k, 5 / c * c + k,
                                           6 / c * c + k, 7 / c * c + k, 8 / c * c + k, 9 / c * c + k, 10 / c * c + k,
                                           11 / c * c + k, 12 / c * c + k, 13 / c * c + k, 14 / c * c + k, 15 / c * c + k);
    return _mm512_permutexvar_ps(from, x);
  }

  using Halves = __m256i;
  // float16, to the nearest, halves to even
  FASTSKEL_TARGET static inline Halves halves(Floats x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
  // the lower halves of numbers below 2^16
  FASTSKEL_TARGET static inline Halves narrow(Bits x) {
    return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x));
  }
  FASTSKEL_TARGET static inline void store_halves(std::uint16_t* p, Halves x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  FASTSKEL_TARGET static inline void stream_halves(std::uint16_t* p, Halves x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x);
  }

  static void fence() { _mm_sfence(); }
};

#include "core/view_rows_kernels.h"

}  // namespace

const RowKernels kAvx512Rows = kernels_named("avx512");

}  // namespace fastskel

#endif
