// AVX-512 with BF16: activations that are bfloat16 are multiplied as they are, 32 products an instruction.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "ahead.h"
#include "avx2.h"
#include "call.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace dsv32::avx512 {

struct Bf16X {
  using X = uint16_t;
  using Vector = __m512;
  static constexpr int order(int i) { return i; }
  static uint16_t packed(const Call& call, int64_t index) { return static_cast<const uint16_t*>(call.x)[index]; }
  static void totals(const __m512* sums, float* to) {
    __m256 half[8];
    for (int i = 0; i < 8; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm512_extractf32x8_ps(sums[i], 1));
    avx2::totals(half, to);
  }
};

inline __m512 dot(__m512 sum, __m512i w, const uint16_t* x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

// Adds the products of w[0..1], a chunk of 64 weights, with R rows.
template <int R>
inline void multiply(const __m512i* w, const uint16_t* x, __m512* sums) {
  for (int r = 0; r < R; ++r)
    sums[r] = _mm512_add_ps(sums[r], dot(dot(_mm512_setzero_ps(), w[0], x + r * 64), w[1], x + r * 64 + 32));
}

struct Nvfp4 : Bf16X {
  using Scale = uint8_t;
  static constexpr int kChunk = 128, kBytes = 64, kScales = 8;

  // Sixteen bits hold four neighbours: the j-th vector has the j-th of each.
  static constexpr int order(int i) { return 4 * (i % 32) + i / 32; }

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    if (call.row_scales * 16 != call.k) return avx2::Nvfp4::scales(call, row, 2 * start, 2 * chunks, scale);
    const uint8_t* codes = call.scales + row * call.row_scales + start * kScales;
    const int64_t there = std::min(chunks * kScales, call.row_scales - start * kScales);
    for (int64_t i = 0; i < there; i += 32) {
      const __mmask32 valid = there - i < 32 ? (1u << (there - i)) - 1 : ~0u;
      const __m256i code = _mm256_maskz_loadu_epi8(valid, codes + i);
      const __m256i nan = _mm256_set1_epi8(0x7f);
      const __mmask32 bad = _mm256_cmpeq_epi8_mask(_mm256_and_si256(code, nan), nan);
      const __m512i w = _mm512_cvtepu8_epi16(_mm256_mask_mov_epi8(code, bad, _mm256_set1_epi8(0x7e)));
      const __m512i half = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(w, 7), _mm512_set1_epi16(0x3f80)),
                                           _mm512_and_si512(_mm512_slli_epi16(w, 8), _mm512_set1_epi16(short(0x8000))));
      const __m512 unit = _mm512_set1_ps(256);
      _mm512_store_ps(scale + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), unit));
      _mm512_store_ps(scale + i + 16, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), unit));
    }
  }

  template <int R>
  static void add(const uint8_t* codes, const float* scale, const uint16_t* x, __m512* sums) {
    // E2M1 as bfloat16, twice: a lookup takes five bits, of which the fifth belongs to the next code.
    const __m512i e2m1 = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, short(0x8000), short(0xbf00), short(0xbf80),
        short(0xbfc0), short(0xc000), short(0xc040), short(0xc080), short(0xc0c0)));
    const __m512i four = _mm512_loadu_si512(codes);
    const __m512i w[4] = {_mm512_permutexvar_epi16(four, e2m1),
                          _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), e2m1),
                          _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), e2m1),
                          _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), e2m1)};
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(scale)));
    for (int r = 0; r < R; ++r) {
      __m512 part = _mm512_setzero_ps();
      for (int j = 0; j < 4; ++j) part = dot(part, w[j], x + r * kChunk + 32 * j);
      sums[r] = _mm512_fmadd_ps(part, s, sums[r]);
    }
  }
};

struct Fp8 : Bf16X {
  using Scale = float;
  static constexpr int kChunk = 64, kBytes = 64, kScales = 1;

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    avx2::Fp8::scales(call, row, start, chunks, scale);
  }

  static __m512 decode(const uint8_t* values, __m512 unit) {
    const __m256i word = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const __m256i magnitude = _mm256_and_si256(word, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(word, _mm256_set1_epi16(0x80)), 8);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)),
                                         _mm256_set1_epi16(0x7e00));
    const __m256i half = _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)), nan);
    return _mm512_mul_ps(_mm512_cvtph_ps(half), unit);
  }

  // The conversion rounds to bfloat16 as the format says.
  template <int R>
  static void add(const uint8_t* values, const float* scale, const uint16_t* x, __m512* sums) {
    const __m512 unit = _mm512_set1_ps(256 * *scale);
    __m512i w[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 low = decode(values + 32 * j, unit), high = decode(values + 32 * j + 16, unit);
      w[j] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    multiply<R>(w, x, sums);
  }
};

struct Bf16 : Bf16X {
  using Scale = uint8_t;
  static constexpr int kChunk = 64, kBytes = 128, kScales = 0;
  static void scales(const Call&, int64_t, int64_t, int64_t, float*) {}

  template <int R>
  static void add(const uint8_t* values, const float*, const uint16_t* x, __m512* sums) {
    const __m512i w[2] = {_mm512_loadu_si512(values), _mm512_loadu_si512(values + 64)};
    multiply<R>(w, x, sums);
  }
};

#include "rows.inc"

}  // namespace dsv32::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
