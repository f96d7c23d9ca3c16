// AVX2, FMA and F16C: float32 products, eight at a time.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "ahead.h"
#include "attend.h"
#include "call.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dsv32::avx2 {

inline __m256i words(int value) { return _mm256_set1_epi16(short(value)); }

// Sixteen float8_e4m3fn numbers, a word each, as bits of float16 numbers 2^8 times as small.
inline __m256i e4m3_to_half(__m256i w) {
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(w, words(0x80)), 8);
  return _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(w, words(0x7f)), 7));
}

// Sixteen float8_e4m3fn numbers, 2^8 times as small.
struct Sixteen {
  __m256 half[2];
};
inline Sixteen e4m3_to_floats(const uint8_t* values) {
  const __m256i word = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(word, words(0x7f)), words(0x7f));
  const __m256i half = _mm256_or_si256(e4m3_to_half(word), _mm256_and_si256(nan, words(0x7e00)));
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))}};
}

// Rounded to bfloat16, ties to even.
inline __m256 rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7fff)));
  const __m256 near = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(0xffff0000)));
  return _mm256_blendv_ps(near, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

// Eight sums, each added up.
inline void totals(const __m256* sums, float* to) {
  __m256 two[4];
  for (int i = 0; i < 4; ++i) two[i] = _mm256_hadd_ps(sums[2 * i], sums[2 * i + 1]);
  const __m256 low = _mm256_hadd_ps(two[0], two[1]), high = _mm256_hadd_ps(two[2], two[3]);
  const __m256 upper = _mm256_permute2f128_ps(low, high, 0x21), lower = _mm256_blend_ps(low, high, 0xf0);
  _mm256_storeu_ps(to, _mm256_add_ps(lower, upper));
}

struct Float32X {
  using X = float;
  static float packed(const Call& call, int64_t index) { return x_at(call, index); }
};

// Sixteen bfloat16 numbers in one register: those in even and those in odd places.
inline __m256 even(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
inline __m256 odd(__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000))); }

struct Nvfp4 : Float32X {
  static constexpr int kChunk = 128, kBytes = 64, kScaled = 16, kScaleBytes = 1;

  // A lane has the weights that share a scale: four bytes of each of eight scales are brought together.
  static constexpr int order(int i) {
    const int vector = i / 8, lane = i % 8, byte = vector / 8 * 4 + vector % 4;
    return 16 * (lane / 4 * 2 + lane % 4 / 2 * 4 + lane % 2) + 2 * byte + vector / 4 % 2;
  }

  // Eight scales, 2^8 times as small. A NaN stands for 448.
  static __m256 eight_scales(const uint8_t* codes) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(stored, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    const __m128i word = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_blendv_epi8(stored, _mm_set1_epi8(0x7e), nan)), 7);
    const __m256 scales = _mm256_cvtph_ps(_mm_and_si128(word, _mm_set1_epi16(short(0xbf80))));
    return _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  }

  struct Chunk {
    __m256i half[2];
    __m256 scale;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t* scales) : scale(eight_scales(scales)) {
      const __m256 first = _mm256_loadu_ps(reinterpret_cast<const float*>(codes));
      const __m256 second = _mm256_loadu_ps(reinterpret_cast<const float*>(codes + 32));
      const __m256i words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                             0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      half[0] = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), words);
      half[1] = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)), words);
    }

    // E2M1 times 2^8 as bfloat16, its upper byte by one table and its lower by another.
    DSV32_INLINE __m256 vector(int j) const {
      const __m256i upper = _mm256_setr_epi8(
          0, 0x43, 0x43, 0x43, 0x44, 0x44, 0x44, 0x44, -128, -61, -61, -61, -60, -60, -60, -60,
          0, 0x43, 0x43, 0x43, 0x44, 0x44, 0x44, 0x44, -128, -61, -61, -61, -60, -60, -60, -60);
      const __m256i lower = _mm256_setr_epi8(
          0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64,
          0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64);
      const __m256i both = j / 4 % 2 ? _mm256_srli_epi16(half[j / 8], 4) : half[j / 8];
      const __m256i code = _mm256_and_si256(both, _mm256_set1_epi8(15));
      const __m256i high = _mm256_shuffle_epi8(upper, code), low = _mm256_shuffle_epi8(lower, code);
      const __m256i word = j / 2 % 2 ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
      return j % 2 ? odd(word) : even(word);
    }
  };
};

struct Fp8 : Float32X {
  static constexpr int kChunk = 128, kBytes = 128, kScaled = 128, kScaleBytes = 4;
  static constexpr int order(int i) { return i; }

  struct Chunk {
    const uint8_t* values;
    __m256 unit, scale;
    bool exact;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t* scales) : values(codes), scale(_mm256_set1_ps(1)) {
      float step;
      uint32_t bits;
      std::memcpy(&step, scales, 4);
      std::memcpy(&bits, scales, 4);
      unit = _mm256_set1_ps(256 * step), exact = (bits & 0x7fffff) == 0;
    }

    // Rounded to bfloat16, as the format says; nothing is left to round if the scale is a power of two.
    DSV32_INLINE __m256 vector(int j) const {
      const __m256 value = _mm256_mul_ps(e4m3_to_floats(values + j / 2 * 16).half[j % 2], unit);
      return exact ? value : rounded(value);
    }
  };
};

struct Bf16 : Float32X {
  static constexpr int kChunk = 64, kBytes = 128, kScaled = 64, kScaleBytes = 0;
  static constexpr int order(int i) { return i / 16 * 16 + 2 * (i % 8) + i / 8 % 2; }

  struct Chunk {
    const uint8_t* values;
    __m256 scale;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t*) : values(codes), scale(_mm256_set1_ps(1)) {}
    DSV32_INLINE __m256 vector(int j) const {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + j / 2 * 32));
      return j % 2 ? odd(pairs) : even(pairs);
    }
  };
};

// A vector of a pool in float32.
inline void read_floats(const Vectors& from, int64_t row, float* to) {
  const int64_t start = row * from.size, scales = (from.size + 127) / 128;
  if (from.storage == Storage::kFloat32) {
    std::memcpy(to, static_cast<const float*>(from.values) + start, size_t(from.size) * 4);
  } else if (from.storage == Storage::kBf16) {
    const auto* bits = static_cast<const uint16_t*>(from.values) + start;
    for (int64_t i = 0; i < from.size; ++i) to[i] = from_bf16(bits[i]);
  } else {
    const auto* codes = static_cast<const uint8_t*>(from.values) + start;
    for (int64_t i = 0; i < from.size; i += 16) {
      const int64_t count = std::min<int64_t>(16, from.size - i);
      uint8_t few[16] = {};
      float wide[16];
      if (count < 16) std::memcpy(few, codes + i, size_t(count));
      const Sixteen values = e4m3_to_floats(count < 16 ? few : codes + i);
      const __m256 unit = _mm256_set1_ps(256 * from.scales[row * scales + i / 128]);
      for (int half = 0; half < 2; ++half)
        _mm256_storeu_ps((count < 16 ? wide : to + i) + 8 * half, _mm256_mul_ps(values.half[half], unit));
      if (count < 16) std::memcpy(to + i, wide, size_t(count) * 4);
    }
  }
}

struct Simd {
  using Vector = __m256;
  using X = float;
  using Units = __m256;
  static constexpr int kLanes = 8, kPair = 1, kColumns = 2;
  static constexpr int kUnits = 8, kRows = 8;
  static constexpr int outputs(int rows) { return rows == 1 ? 2 : 1; }

  static Units units(const float* x) { return _mm256_loadu_ps(x); }
  static Vector dot(Vector sum, Units w, Units x) { return _mm256_fmadd_ps(w, x, sum); }
  static Vector fma(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
  static void totals(const Vector* sums, float* to) { avx2::totals(sums, to); }

  static Vector load(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
  static Vector set(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static Vector scaled(Vector v, float least, float scale) {
    return _mm256_mul_ps(_mm256_sub_ps(v, _mm256_set1_ps(least)), _mm256_set1_ps(scale));
  }
  static Vector multiply(Vector sum, Vector units, const uint32_t* one) {
    return _mm256_fmadd_ps(units, _mm256_broadcast_ss(reinterpret_cast<const float*>(one)), sum);
  }

  // For v <= 0; what would be smaller than the smallest normal number is that number.
  static Vector exp2(Vector v) {
    v = _mm256_max_ps(_mm256_set1_ps(-126), v);
    const __m256 n = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(v, n);
    __m256 sum = _mm256_set1_ps(kExp2[0]);
    for (int i = 1; i < 7; ++i) sum = _mm256_fmadd_ps(sum, f, _mm256_set1_ps(kExp2[i]));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(sum), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }

  static void read(const Vectors& from, int64_t row, bool as_bf16, float* to) {
    read_floats(from, row, to);
    if (as_bf16 && from.storage != Storage::kBf16)
      for (int64_t i = 0; i < from.size; ++i) {
        const __m256 one = rounded(_mm256_set1_ps(to[i]));
        to[i] = _mm256_cvtss_f32(one);
      }
  }

  static void pair(const float* rows, int64_t, int64_t count, uint32_t* units) {
    std::memcpy(units, rows, size_t(count) * 4);
    std::fill(units + count, units + 64, 0);
  }

  static void weights(const float* score, int64_t count, float factor, bool as_bf16, uint32_t* units) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __m256 weight = _mm256_mul_ps(_mm256_loadu_ps(score + i), _mm256_set1_ps(factor));
      _mm256_storeu_ps(reinterpret_cast<float*>(units + i), as_bf16 ? rounded(weight) : weight);
    }
  }
};

#include "attend.inc"
#include "rows.inc"

}  // namespace dsv32::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
