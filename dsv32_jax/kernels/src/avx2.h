// AVX2, FMA and F16C: float32 products, eight at a time.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "ahead.h"
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
  using Vector = __m256;
  static float packed(const Call& call, int64_t index) { return x_at(call, index); }
  static void totals(const __m256* sums, float* to) { avx2::totals(sums, to); }
};

// Sixteen bfloat16 numbers in one register: those in even and those in odd places.
inline __m256 even(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
inline __m256 odd(__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000))); }

// Adds the products of w[0..7], a chunk of 64 weights, with R rows.
template <int R>
inline void multiply(const __m256* w, const float* x, __m256* sums) {
  for (int r = 0; r < R; ++r) {
    __m256 part[2] = {};
    for (int j = 0; j < 8; ++j) part[j % 2] = _mm256_fmadd_ps(w[j], _mm256_loadu_ps(x + r * 64 + 8 * j), part[j % 2]);
    sums[r] = _mm256_add_ps(sums[r], _mm256_add_ps(part[0], part[1]));
  }
}

struct Nvfp4 : Float32X {
  using Scale = uint8_t;
  static constexpr int kChunk = 64, kBytes = 32, kScales = 4;

  // A byte's nibbles are two neighbours; unpacking interleaves within halves of the register.
  static constexpr int order(int i) {
    const int vector = i / 8, lane = i % 8;
    const int word = 16 * (lane / 4) + 8 * (vector / 2 % 2) + 2 * (lane % 4) + vector % 2;
    return 2 * word + vector / 4;
  }

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    const int64_t width = call.k / call.row_scales, each = width / 16;
    const int64_t before = start * kScales, from = before / each;
    const int64_t count = (before + chunks * kScales + each - 1) / each - from;
    const uint8_t* codes = call.scales + row * call.row_scales;
    for (int64_t i = 0; i < count; i += 16) {
      __m128i code = _mm_setzero_si128();
      const int64_t there = call.row_scales - from - i;
      if (there >= 16)
        code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + from + i));
      else if (there > 0)
        std::memcpy(&code, codes + from + i, size_t(there));
      const __m128i most = _mm_set1_epi8(0x7e), nan = _mm_set1_epi8(0x7f);
      code = _mm_blendv_epi8(code, most, _mm_cmpeq_epi8(_mm_and_si128(code, nan), nan));
      const __m256i half = e4m3_to_half(_mm256_cvtepu8_epi16(code));
      const __m256 unit = _mm256_set1_ps(256);
      _mm256_store_ps(scale + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), unit));
      _mm256_store_ps(scale + i + 8, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), unit));
    }
    if (each > 1)
      for (int64_t i = chunks * kScales - 1; i >= 0; --i) scale[i] = scale[(before + i) / each - from];
  }

  // E2M1 as bfloat16, its upper byte by one table and its lower by another. The scales multiply sums of products.
  template <int R>
  static void add(const uint8_t* codes, const float* scale, const float* x, __m256* sums) {
    const __m256i upper = _mm256_setr_epi8(
        0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64,
        0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64);
    const __m256i lower = _mm256_setr_epi8(
        0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64,
        0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    __m256 w[8];
    for (int half = 0; half < 2; ++half) {
      const __m256i code = _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, nibble);
      const __m256i high = _mm256_shuffle_epi8(upper, code), low = _mm256_shuffle_epi8(lower, code);
      const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
      w[4 * half] = even(first), w[4 * half + 1] = odd(first);
      w[4 * half + 2] = even(second), w[4 * half + 3] = odd(second);
    }
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scale));
    const __m256 s[2] = {_mm256_permutevar_ps(four, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2)),
                         _mm256_permutevar_ps(four, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3))};
    for (int r = 0; r < R; ++r) {
      __m256 part[2] = {};
      for (int j = 0; j < 8; ++j) {
        __m256& sum = part[j / 2 % 2];
        sum = _mm256_fmadd_ps(w[j], _mm256_loadu_ps(x + r * 64 + 8 * j), sum);
      }
      sums[r] = _mm256_fmadd_ps(part[0], s[0], _mm256_fmadd_ps(part[1], s[1], sums[r]));
    }
  }
};

struct Fp8 : Float32X {
  using Scale = float;
  static constexpr int kChunk = 64, kBytes = 64, kScales = 1;
  static constexpr int order(int i) { return i; }

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    const float* blocks = reinterpret_cast<const float*>(call.scales) + row * call.row_scales;
    for (int64_t c = 0; c < chunks; ++c) scale[c] = blocks[(start + c) * kChunk / 128];
  }

  // Rounded to bfloat16, ties to even, as the format says; nothing is left to round where the scale is a power of two.
  static __m256 rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7fff)));
    const __m256 near = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(0xffff0000)));
    return _mm256_blendv_ps(near, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  template <int R>
  static void add(const uint8_t* values, const float* scale, const float* x, __m256* sums) {
    const __m256 s = _mm256_set1_ps(256 * *scale);
    uint32_t bits;
    std::memcpy(&bits, scale, 4);
    const bool exact = (bits & 0x7fffff) == 0;
    __m256 w[8];
    for (int j = 0; j < 8; j += 2) {
      const __m256i word = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8 * j)));
      const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(word, words(0x7f)), words(0x7f));
      const __m256i half = _mm256_or_si256(e4m3_to_half(word), _mm256_and_si256(nan, words(0x7e00)));
      for (int i = 0; i < 2; ++i) {
        const __m128i eight = i ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
        w[j + i] = _mm256_mul_ps(_mm256_cvtph_ps(eight), s);
        if (!exact) w[j + i] = rounded(w[j + i]);
      }
    }
    multiply<R>(w, x, sums);
  }
};

struct Bf16 : Float32X {
  using Scale = uint8_t;
  static constexpr int kChunk = 64, kBytes = 128, kScales = 0;
  static constexpr int order(int i) { return i / 16 * 16 + 2 * (i % 8) + i / 8 % 2; }
  static void scales(const Call&, int64_t, int64_t, int64_t, float*) {}

  template <int R>
  static void add(const uint8_t* values, const float*, const float* x, __m256* sums) {
    __m256 w[8];
    for (int j = 0; j < 4; ++j) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * j));
      w[2 * j] = even(v), w[2 * j + 1] = odd(v);
    }
    multiply<R>(w, x, sums);
  }
};

#include "rows.inc"

}  // namespace dsv32::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
