// Bodies of the row kernels: each source of an instruction set defines FASTSKEL_TARGET and `Lanes` and includes them in its
// unnamed namespace. Everything here has internal linkage and calls nothing inline from elsewhere: the linker must not hand a
// function that was compiled for a wide instruction set to code that runs without.

#define FASTSKEL_INLINE inline FASTSKEL_TARGET __attribute__((always_inline))

using Quad = float __attribute__((vector_size(16)));

FASTSKEL_INLINE Quad load_quad(const float* p) {
  Quad x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

FASTSKEL_INLINE void store_quad(float* p, Quad x) { __builtin_memcpy(p, &x, sizeof x); }

struct Position {
  const float* lower;
  const float* upper;
  float rest, weight;
};

// where the next row comes from: source frame `lower` and `numerator` / `denominator` of the way to the one behind it
struct Walk {
  const float* crop;
  std::int64_t last, lower, numerator, denominator, step, step_numerator;
};

FASTSKEL_INLINE Walk walk_of(Rows rows, std::int64_t size) {
  // source position of frame i is (2 i + 1) length / (2 frames) - 1 / 2: a whole numerator picks the same frames everywhere.
  // It is negative before the centre of the first source frame, where a step is less than one frame
  const std::int64_t length = rows.crop.length, denominator = 2 * rows.frames;
  const std::int64_t numerator = (2 * rows.first + 1) * length - rows.frames;
  const std::int64_t lower = numerator < 0 ? 0 : numerator / denominator, step = length / rows.frames;
  return {rows.clip + rows.crop.start * size, length - 1, lower, numerator - lower * denominator, denominator, step,
          2 * (length - step * rows.frames)};
}

// the position of a row, and the walk on to the next one without dividing whole numbers again
FASTSKEL_INLINE Position next_position(Walk& walk, std::int64_t size) {
  const std::int64_t numerator = walk.numerator < 0 ? 0 : walk.numerator;
  const std::int64_t upper = walk.lower < walk.last ? walk.lower + 1 : walk.last;
  const auto weight = static_cast<float>(static_cast<double>(numerator) / static_cast<double>(walk.denominator));
  const Position at{walk.crop + walk.lower * size, walk.crop + upper * size, 1.0f - weight, weight};
  walk.lower += walk.step;
  walk.numerator += walk.step_numerator;
  if (walk.numerator >= walk.denominator) {
    walk.numerator -= walk.denominator;
    ++walk.lower;
  }
  return at;
}

FASTSKEL_TARGET void resize_rows(Rows rows, FrameShape shape, float* out, std::uint8_t* mask) {
  const std::int64_t body_size = shape.joints * shape.channels, size = shape.bodies * body_size;
  Walk walk = walk_of(rows, size);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const Position at = next_position(walk, size);
    const Lanes::Floats rest = Lanes::fill(at.rest), weight = Lanes::fill(at.weight);
    for (std::int64_t body = 0; body < shape.bodies; ++body) {
      const float* a = at.lower + body * body_size;
      const float* b = at.upper + body * body_size;
      float* y = out + row * size + body * body_size;
      Lanes::Bits seen = Lanes::no_bits();
      std::int64_t i = 0;
      for (; i + Lanes::kCount <= body_size; i += Lanes::kCount) {
        const Lanes::Floats value = rest * Lanes::load(a + i) + weight * Lanes::load(b + i);
        seen |= Lanes::bits(value);
        Lanes::store(y + i, value);
      }
      if (i < body_size) {
        const std::int64_t num = body_size - i;
        const Lanes::Floats value = rest * Lanes::load_part(a + i, num) + weight * Lanes::load_part(b + i, num);
        seen |= Lanes::bits(value);
        // what lies behind the body is made after it, or is slack
        Lanes::store(y + i, value);
      }
      mask[row * shape.bodies + body] = Lanes::any_nonzero(seen);
    }
  }
}

template <int kChannels>
FASTSKEL_INLINE Lanes::Floats times_matrices(Lanes::Floats x, const float* matrices) {
  Lanes::Floats y = Lanes::expand<kChannels, 0>(x) * Lanes::load(matrices);
  y = y + Lanes::expand<kChannels, 1>(x) * Lanes::load(matrices + Lanes::kCount);
  if (kChannels == 3) y = y + Lanes::expand<kChannels, kChannels - 1>(x) * Lanes::load(matrices + 2 * Lanes::kCount);
  return y;
}

template <int kChannels>
FASTSKEL_INLINE void resize_multiply_channels(Rows rows, FrameShape shape, const float* matrices, float* out,
                                              std::uint8_t* mask) {
  constexpr std::int64_t kUsed = Lanes::kCount / kChannels * kChannels;
  const std::int64_t body_size = shape.joints * kChannels, size = shape.bodies * body_size;
  const std::int64_t whole = body_size / kUsed * kUsed;
  Walk walk = walk_of(rows, size);
  for (std::int64_t row = 0; row < rows.count; ++row) {
    const Position at = next_position(walk, size);
    const Lanes::Floats rest = Lanes::fill(at.rest), weight = Lanes::fill(at.weight);
    for (std::int64_t body = 0; body < shape.bodies; ++body) {
      const float* a = at.lower + body * body_size;
      const float* b = at.upper + body * body_size;
      float* y = out + row * size + body * body_size;
      const float* group = matrices;
      Lanes::Bits seen = Lanes::no_bits();
      std::int64_t i = 0;
      for (; i < whole; i += kUsed, group += kChannels * Lanes::kCount) {
        const Lanes::Floats value =
            rest * Lanes::load_joints<kUsed>(a + i) + weight * Lanes::load_joints<kUsed>(b + i);
        seen |= Lanes::bits(value);
        // the lanes behind the last joint of a vector are garbage that the next one replaces
        Lanes::store(y + i, times_matrices<kChannels>(value, group));
      }
      if (i < body_size) {
        const std::int64_t num = body_size - i;
        const Lanes::Floats value = rest * Lanes::load_part(a + i, num) + weight * Lanes::load_part(b + i, num);
        seen |= Lanes::bits(value);
        Lanes::store(y + i, times_matrices<kChannels>(value, group));
      }
      mask[row * shape.bodies + body] = Lanes::any_nonzero(seen);
    }
  }
}

FASTSKEL_TARGET void resize_multiply_rows(Rows rows, FrameShape shape, const float* matrices, float* out,
                                          std::uint8_t* mask) {
  if (shape.channels == 3) {
    resize_multiply_channels<3>(rows, shape, matrices, out, mask);
  } else {
    resize_multiply_channels<2>(rows, shape, matrices, out, mask);
  }
}

template <int kChannels>
FASTSKEL_INLINE void multiply_channels(const float* rows, std::int64_t num_bodies, std::int64_t body_size,
                                       const float* matrices, float* out) {
  constexpr std::int64_t kUsed = Lanes::kCount / kChannels * kChannels;
  for (std::int64_t body = 0; body < num_bodies; ++body, rows += body_size, out += body_size) {
    const float* group = matrices;
    for (std::int64_t i = 0; i < body_size; i += kUsed, group += kChannels * Lanes::kCount) {
      Lanes::store(out + i, times_matrices<kChannels>(Lanes::load(rows + i), group));
    }
  }
}

FASTSKEL_TARGET void multiply_rows(const float* rows, std::int64_t count, FrameShape shape, const float* matrices,
                                   float* out) {
  const std::int64_t body_size = shape.joints * shape.channels;
  if (shape.channels == 3) {
    multiply_channels<3>(rows, count * shape.bodies, body_size, matrices, out);
  } else {
    multiply_channels<2>(rows, count * shape.bodies, body_size, matrices, out);
  }
}

FASTSKEL_TARGET void mirror_rows(const float* rows, std::int64_t count, FrameShape shape, const std::int32_t* joints,
                                 float sign, float* out) {
  const std::int64_t channels = shape.channels, body_size = shape.joints * channels;
  for (std::int64_t body = 0; body < count * shape.bodies; ++body, rows += body_size) {
    for (std::int64_t joint = 0; joint < shape.joints; ++joint, out += channels) {
      const float* from = rows + joints[joint] * channels;
      if (channels <= 4) {
        const Quad factor = {sign, 1.0f, 1.0f, 1.0f};
        store_quad(out, load_quad(from) * factor);
      } else {
        for (std::int64_t channel = 0; channel < channels; ++channel) out[channel] = from[channel];
        out[0] = from[0] * sign;
      }
    }
  }
}

FASTSKEL_TARGET void bone_rows(const float* rows, std::int64_t count, FrameShape shape, const std::int32_t* parents,
                               float* out) {
  const std::int64_t channels = shape.channels, body_size = shape.joints * channels;
  for (std::int64_t body = 0; body < count * shape.bodies; ++body, rows += body_size) {
    for (std::int64_t joint = 0; joint < shape.joints; ++joint, out += channels) {
      const float* x = rows + joint * channels;
      const float* parent = rows + parents[joint] * channels;
      if (channels <= 4) {
        store_quad(out, load_quad(x) - load_quad(parent));
      } else {
        for (std::int64_t channel = 0; channel < channels; ++channel) out[channel] = x[channel] - parent[channel];
      }
    }
  }
}

FASTSKEL_TARGET void subtract_rows(const float* a, const float* b, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; i += Lanes::kCount) Lanes::store(out + i, Lanes::load(a + i) - Lanes::load(b + i));
}

FASTSKEL_TARGET void blur_row(const float* const* taps, const float* weights, std::int64_t num_taps, std::int64_t size,
                              float* out) {
  for (std::int64_t i = 0; i < size; i += Lanes::kCount) {
    Lanes::Floats sum = Lanes::fill(weights[0]) * Lanes::load(taps[0] + i);
    for (std::int64_t j = 1; j < num_taps; ++j) sum = sum + Lanes::fill(weights[j]) * Lanes::load(taps[j] + i);
    Lanes::store(out + i, sum);
  }
}

using Ints = decltype(Lanes::bits(Lanes::Floats{}) < 0u);

FASTSKEL_INLINE Lanes::Floats floats_of(Ints x) { return __builtin_convertvector(x, Lanes::Floats); }
FASTSKEL_INLINE Lanes::Floats chosen(Lanes::Bits mask, Lanes::Floats yes, Lanes::Floats no) {
  return reinterpret_cast<Lanes::Floats>((mask & Lanes::bits(yes)) | (~mask & Lanes::bits(no)));
}

struct Normals {
  Lanes::Floats cosine, sine;
};

// two standard normals of two words (Box-Muller); Taylor series over ranges so small that they end below rounding
FASTSKEL_INLINE Normals normal_pairs(Lanes::Bits word0, Lanes::Bits word1) {
  using Floats = Lanes::Floats;
  using Bits = Lanes::Bits;
  // 1 - uniform(word0), exact and in (0, 1]
  const Floats u = floats_of(reinterpret_cast<Ints>(0x1000000u - (word0 >> 8))) * 0x1p-24f;
  // u = 2^exponent * m with m in [sqrt(1/2), sqrt(2))
  const Ints exponent = reinterpret_cast<Ints>(Lanes::bits(u) - 0x3F3504F3u) >> 23;
  const Floats m = reinterpret_cast<Floats>(Lanes::bits(u) - (reinterpret_cast<Bits>(exponent) << 23));
  // log m = 2 atanh(s)
  const Floats s = (m - 1.0f) / (m + 1.0f), z = s * s, e = floats_of(exponent);
  const Floats series = (((z * (1.0f / 11) + 1.0f / 9) * z + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3;
  // log 2 in two parts, the first with few bits, so that its product is exact
  const Floats log_u = e * 0.693145751953125f + (2.0f * s + (2.0f * s * z * series + e * 1.42860682030941723212e-6f));
  const Floats radius = Lanes::root(-2.0f * log_u);
  // 4 u2 = quarter + rest with rest in [-1/2, 1/2), exact
  const Bits turn = word1 >> 8, quarter = (turn + (1u << 21)) >> 22;
  const Floats t = floats_of(reinterpret_cast<Ints>(turn - (quarter << 22))) * 0x1p-22f * 1.57079632679489661923f, t2 = t * t;
  const Floats sine = t + t * t2 * (t2 * (t2 * (t2 * (1.0f / 362880) - 1.0f / 5040) + 1.0f / 120) - 1.0f / 6);
  const Floats cosine =
      t2 * (t2 * (t2 * (t2 * (t2 * (-1.0f / 3628800) + 1.0f / 40320) - 1.0f / 720) + 1.0f / 24) - 0.5f) + 1.0f;
  const Bits swap = 0u - (quarter & 1u), sign_x = ((quarter + 1u) & 2u) << 30, sign_y = (quarter & 2u) << 30;
  const Floats x = radius * chosen(swap, sine, cosine), y = radius * chosen(swap, cosine, sine);
  return {reinterpret_cast<Floats>(Lanes::bits(x) ^ sign_x), reinterpret_cast<Floats>(Lanes::bits(y) ^ sign_y)};
}

struct Product {
  Lanes::Bits high, low;
};

FASTSKEL_INLINE Product product(Lanes::Bits x, std::uint32_t factor) {
  // 64-bit products of the even and of the odd lanes
  const auto pairs = reinterpret_cast<Lanes::Wide>(x);
  const Lanes::Wide even = Lanes::multiply_even(pairs, factor), odd = Lanes::multiply_even(pairs >> 32, factor);
  constexpr std::uint64_t kLow = 0xFFFFFFFFu;
  return {reinterpret_cast<Lanes::Bits>((even >> 32) | (odd & ~kLow)),
          reinterpret_cast<Lanes::Bits>((even & kLow) | (odd << 32))};
}

FASTSKEL_TARGET void normal_blocks(const DrawAddress& address, std::uint32_t use, std::uint32_t first_block,
                                   std::int64_t num_blocks, float* out) {
  using Bits = Lanes::Bits;
  Bits lane{};
  for (std::uint32_t i = 0; i < Lanes::kCount; ++i) lane[i] = i;
  const Bits zero{};
  for (std::int64_t begin = 0; begin < num_blocks; begin += Lanes::kCount, out += 4 * Lanes::kCount) {
    Bits c0 = zero + address.index, c1 = zero + address.step, c2 = zero + (address.view | (use << 16));
    Bits c3 = lane + (first_block + static_cast<std::uint32_t>(begin));
    auto key0 = static_cast<std::uint32_t>(address.seed);
    auto key1 = static_cast<std::uint32_t>(address.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Product product0 = product(c0, 0xD2511F53u), product1 = product(c2, 0xCD9E8D57u);
      c0 = product1.high ^ c1 ^ key0;
      c1 = product1.low;
      c2 = product0.high ^ c3 ^ key1;
      c3 = product0.low;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const Normals first = normal_pairs(c0, c1), second = normal_pairs(c2, c3);
    float normals[4][Lanes::kCount];
    Lanes::store(normals[0], first.cosine);
    Lanes::store(normals[1], first.sine);
    Lanes::store(normals[2], second.cosine);
    Lanes::store(normals[3], second.sine);
    for (std::int64_t i = 0; i < Lanes::kCount; ++i) {
      store_quad(out + 4 * i, Quad{normals[0][i], normals[1][i], normals[2][i], normals[3][i]});
    }
  }
}

template <int kChannels>
FASTSKEL_INLINE void add_noise_channels(const float* rows, std::int64_t size, const float* normals, float std, float* out) {
  using Floats = Lanes::Floats;
  constexpr std::int64_t kUsed = Lanes::kCount / kChannels * kChannels;
  const Floats scale = Lanes::fill(std);
  for (std::int64_t i = 0; i < size; i += kUsed) {
    const Floats x = Lanes::load(rows + i);
    Lanes::Bits seen = Lanes::bits(Lanes::expand<kChannels, 0>(x)) | Lanes::bits(Lanes::expand<kChannels, 1>(x));
    if (kChannels == 3) seen |= Lanes::bits(Lanes::expand<kChannels, kChannels - 1>(x));
    const auto present = reinterpret_cast<Lanes::Bits>((seen & 0x7FFFFFFFu) != 0u);
    Lanes::store(out + i, chosen(present, x + scale * Lanes::load(normals + i), x));
  }
}

FASTSKEL_TARGET void add_noise_rows(const float* rows, std::int64_t num_joints, std::int64_t channels, const float* normals,
                                    float std, float* out) {
  if (channels == 3) return add_noise_channels<3>(rows, num_joints * channels, normals, std, out);
  if (channels == 2) return add_noise_channels<2>(rows, num_joints * channels, normals, std, out);
  for (std::int64_t joint = 0; joint < num_joints; ++joint, rows += channels, normals += channels, out += channels) {
    bool present = false;
    for (std::int64_t channel = 0; channel < channels; ++channel) present |= rows[channel] != 0.0f;
    for (std::int64_t channel = 0; channel < channels; ++channel) {
      out[channel] = present ? rows[channel] + std * normals[channel] : rows[channel];
    }
  }
}

// the upper halves of floats, to the nearest, halves to even; the carry takes what is too large to infinity
FASTSKEL_INLINE Lanes::Bits bfloat(Lanes::Floats x) {
  const Lanes::Bits bits = Lanes::bits(x), upper = bits >> 16;
  const auto nan = reinterpret_cast<Lanes::Bits>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return (nan & (upper | 0x40u)) | (~nan & ((bits + 0x7FFFu + (upper & 1u)) >> 16));
}

struct Float32 {
  using Element = float;
  FASTSKEL_INLINE static void store(float* p, Lanes::Floats x) { Lanes::store(p, x); }
  FASTSKEL_INLINE static void stream(float* p, Lanes::Floats x) { Lanes::stream(p, x); }
};

struct Float16 {
  using Element = std::uint16_t;
  FASTSKEL_INLINE static void store(std::uint16_t* p, Lanes::Floats x) { Lanes::store_halves(p, Lanes::halves(x)); }
  FASTSKEL_INLINE static void stream(std::uint16_t* p, Lanes::Floats x) { Lanes::stream_halves(p, Lanes::halves(x)); }
};

struct BFloat16 {
  using Element = std::uint16_t;
  FASTSKEL_INLINE static void store(std::uint16_t* p, Lanes::Floats x) { Lanes::store_halves(p, Lanes::narrow(bfloat(x))); }
  FASTSKEL_INLINE static void stream(std::uint16_t* p, Lanes::Floats x) {
    Lanes::stream_halves(p, Lanes::narrow(bfloat(x)));
  }
};

// past the caches, which a batch does not fit in, from where `out` is aligned to one vector; the ends in the usual way
template <typename Format>
FASTSKEL_TARGET void store_rows(const float* rows, std::int64_t size, void* out) {
  using Element = typename Format::Element;
  auto* to = static_cast<Element*>(out);
  constexpr std::size_t kBytes = Lanes::kCount * sizeof(Element);
  const auto missing = static_cast<std::int64_t>((0 - reinterpret_cast<std::uintptr_t>(out)) % kBytes / sizeof(Element));
  std::int64_t i = missing < size ? missing : size;
  Element part[Lanes::kCount];
  if (i > 0) {
    Format::store(part, Lanes::load(rows));
    __builtin_memcpy(to, part, static_cast<std::size_t>(i) * sizeof(Element));
  }
  for (; i + Lanes::kCount <= size; i += Lanes::kCount) Format::stream(to + i, Lanes::load(rows + i));
  if (i < size) {
    Format::store(part, Lanes::load(rows + i));
    __builtin_memcpy(to + i, part, static_cast<std::size_t>(size - i) * sizeof(Element));
  }
}

constexpr RowKernels kernels_named(const char* name) {
  return {name,
          Lanes::kCount,
          resize_rows,
          resize_multiply_rows,
          multiply_rows,
          mirror_rows,
          bone_rows,
          subtract_rows,
          blur_row,
          normal_blocks,
          add_noise_rows,
          {store_rows<Float32>, store_rows<Float16>, store_rows<BFloat16>},
          Lanes::fence};
}
