// AVX-512 with BF16: activations that are bfloat16 are multiplied as they are, 32 products an instruction.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "ahead.h"
#include "attend.h"
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
  static constexpr int kOutputs = 1;
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

// Adds the products of w[0..1], which are 64 weights, with R rows that are `stride` apart.
template <int R>
inline void multiply(const __m512i* w, const uint16_t* x, int stride, __m512* sums) {
  for (int r = 0; r < R; ++r, x += stride)
    sums[r] = _mm512_add_ps(sums[r], dot(dot(_mm512_setzero_ps(), w[0], x), w[1], x + 32));
}

struct Nvfp4 : Bf16X {
  static constexpr int kChunk = 256, kBytes = 128, kScaled = 16, kScaleBytes = 1, kOutputs = 2;

  // Sixteen bits of a half of the chunk hold four neighbours: the j-th vector has the j-th of each.
  static constexpr int order(int i) { return i / 128 * 128 + 4 * (i % 32) + i % 128 / 32; }

  static void pack_chunk(const uint16_t* x, uint16_t* packed) {
    const __m512i pair = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i fourth =
        _mm512_add_epi32(_mm512_mullo_epi32(pair, _mm512_set1_epi32(0x80008)), _mm512_set1_epi32(0x40000));
    for (int i = 0; i < kChunk; i += 64, x += 64)
      for (int j = 0; j < 4; ++j) {
        const __m512i at = _mm512_add_epi16(fourth, _mm512_set1_epi16(short(j)));
        const __m512i four = _mm512_permutex2var_epi16(_mm512_loadu_si512(x), at, _mm512_loadu_si512(x + 32));
        auto* to = reinterpret_cast<__m256i*>(packed + i / 128 * 128 + 32 * j + i % 128 / 4);
        _mm256_storeu_si256(to, _mm512_castsi512_si256(four));
      }
  }

  // Sixteen scales, 2^8 times as small. A NaN stands for 448.
  static __m512 sixteen_scales(const uint8_t* codes) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(stored, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    const __m256i word = _mm256_cvtepi8_epi16(_mm_blendv_epi8(stored, _mm_set1_epi8(0x7e), nan));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(word, 7), _mm256_set1_epi16(short(0xbf80))));
  }

  template <int R>
  static void add(const uint8_t* const* codes, const uint8_t* const* scale, const uint16_t* x, __m512 (*sums)[R]) {
    // E2M1 times 2^8 as bfloat16, twice: a lookup takes five bits, of which the fifth belongs to the next code.
    const __m512i e2m1 = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x4300, 0x4380, 0x43c0, 0x4400, 0x4440, 0x4480, 0x44c0, short(0x8000), short(0xc300), short(0xc380),
        short(0xc3c0), short(0xc400), short(0xc440), short(0xc480), short(0xc4c0)));
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 scales[2] = {sixteen_scales(scale[0]), sixteen_scales(scale[1])};
    for (int half = 0; half < 2; ++half, x += 128) {
      __m512i w[2][4];
      __m512 s[2];
      for (int o = 0; o < 2; ++o) {
        const __m512i four = _mm512_loadu_si512(codes[o] + 64 * half);
        for (int j = 0; j < 4; ++j) w[o][j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4 * j), e2m1);
        s[o] = _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8 * half)), scales[o]);
      }
      for (int r = 0; r < R; ++r) {
        __m512 part[2] = {};
        for (int j = 0; j < 4; ++j)
          for (int o = 0; o < 2; ++o) part[o] = dot(part[o], w[o][j], x + r * kChunk + 32 * j);
        for (int o = 0; o < 2; ++o) sums[o][r] = _mm512_fmadd_ps(part[o], s[o], sums[o][r]);
      }
    }
  }
};

struct Fp8 : Bf16X {
  static constexpr int kChunk = 128, kBytes = 128, kScaled = 128, kScaleBytes = 4;
  static void pack_chunk(const uint16_t* x, uint16_t* packed) { std::memcpy(packed, x, 2 * kChunk); }

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
  static void add(const uint8_t* const* codes, const uint8_t* const* scale, const uint16_t* x, __m512 (*sums)[R]) {
    float step;
    std::memcpy(&step, *scale, 4);
    const __m512 unit = _mm512_set1_ps(256 * step);
    for (int start = 0; start < kChunk; start += 64) {
      __m512i w[2];
      for (int j = 0; j < 2; ++j) {
        const uint8_t* half = *codes + start + 32 * j;
        w[j] = (__m512i)_mm512_cvtne2ps_pbh(decode(half + 16, unit), decode(half, unit));
      }
      multiply<R>(w, x + start, kChunk, *sums);
    }
  }
};

struct Bf16 : Bf16X {
  static constexpr int kChunk = 64, kBytes = 128, kScaled = 64, kScaleBytes = 0;
  static void pack_chunk(const uint16_t* x, uint16_t* packed) { std::memcpy(packed, x, 2 * kChunk); }

  template <int R>
  static void add(const uint8_t* const* codes, const uint8_t* const*, const uint16_t* x, __m512 (*sums)[R]) {
    const __m512i w[2] = {_mm512_loadu_si512(*codes), _mm512_loadu_si512(*codes + 64)};
    multiply<R>(w, x, kChunk, *sums);
  }
};

struct Simd {
  using Vector = __m512;
  using X = uint16_t;
  static constexpr int kLanes = 16, kPair = 2, kColumns = 4;

  static Vector load(const void* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
  static Vector set(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector scaled(Vector v, float least, float scale) {
    return _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(least)), _mm512_set1_ps(scale));
  }
  static Vector multiply(Vector sum, Vector units, const uint32_t* one) {
    return _mm512_dpbf16_ps(sum, (__m512bh)units, (__m512bh)_mm512_set1_epi32(int(*one)));
  }

  static Vector exp2(Vector v) {
    v = _mm512_max_ps(_mm512_set1_ps(-150), v);
    const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(v, n);
    __m512 sum = _mm512_set1_ps(kExp2[0]);
    for (int i = 1; i < 7; ++i) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(kExp2[i]));
    return _mm512_scalef_ps(sum, n);
  }

  static void read(const Vectors& from, int64_t row, bool, uint16_t* to) {
    if (from.storage == Storage::kBf16) {
      std::memcpy(to, static_cast<const uint16_t*>(from.values) + row * from.size, size_t(from.size) * 2);
      return;
    }
    auto& floats = scratch().floats;
    floats.resize(size_t(from.size));
    avx2::read_floats(from, row, floats.data());
    round(floats.data(), from.size, 1, to);
  }

  static void round(const float* from, int64_t count, float factor, uint16_t* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 there = count - i < kLanes ? __mmask16((1 << (count - i)) - 1) : __mmask16(-1);
      const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + i), _mm512_set1_ps(factor));
      _mm256_mask_storeu_epi16(to + i, there, (__m256i)_mm512_cvtneps_pbh(v));
    }
  }

  static void pair(const uint16_t* rows, int64_t width, int64_t count, uint32_t* units) {
    for (int64_t i = 0; i < count; ++i) units[i] = rows[i] | uint32_t(rows[width + i]) << 16;
    std::fill(units + count, units + 64, 0);
  }

  static void weights(const float* score, int64_t count, float factor, bool, uint32_t* units) {
    round(score, count, factor, reinterpret_cast<uint16_t*>(units));
  }
};

#include "attend.inc"
#include "rows.inc"

}  // namespace dsv32::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
