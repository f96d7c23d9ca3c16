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
  using X = uint16_t;
  static constexpr int order(int i) { return i; }
  static uint16_t packed(const Call& call, int64_t index) { return static_cast<const uint16_t*>(call.x)[index]; }
};

struct Nvfp4 : Bf16X {
  static constexpr int kChunk = 256, kBytes = 128, kScaled = 16, kScaleBytes = 1;

  // A lane has the weights that share a scale. Sixteen bits hold four of them: vector j has the j % 4-th of each, of the
  // first or the second half.
  static constexpr int order(int i) {
    const int vector = i / 32, lane = i % 32 / 2;
    return 16 * lane + vector / 4 * 8 + i % 2 * 4 + vector % 4;
  }

  static void pack_chunk(const uint16_t* x, uint16_t* packed) {
    uint16_t order[32], few[32];
    for (int i = 0; i < 32; ++i) order[i] = uint16_t(i % 4 / 2 * 16 + i / 16 * 8 + i % 2 * 4 + i / 4 % 4);
    const __m512i at = _mm512_loadu_si512(order);
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(few, _mm512_permutexvar_epi16(at, _mm512_loadu_si512(x + 32 * i)));
      for (int j = 0; j < 8; ++j) std::memcpy(packed + 32 * j + 4 * i, few + 4 * j, 8);
    }
  }

  // Sixteen scales, 2^8 times as small. A NaN stands for 448.
  static __m512 sixteen_scales(const uint8_t* codes) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(stored, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    const __m256i word = _mm256_cvtepi8_epi16(_mm_blendv_epi8(stored, _mm_set1_epi8(0x7e), nan));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(word, 7), _mm256_set1_epi16(short(0xbf80))));
  }

  struct Chunk {
    __m512i half[2];
    __m512 scale;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t* scales) : scale(sixteen_scales(scales)) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
      half[0] = _mm512_permutex2var_epi32(first, even, second);
      half[1] = _mm512_permutex2var_epi32(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
    }

    // E2M1 times 2^8 as bfloat16, twice: a lookup takes five bits, of which the fifth belongs to the next code.
    DSV32_INLINE __m512i vector(int j) const {
      const __m512i e2m1 = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          0, 0x4300, 0x4380, 0x43c0, 0x4400, 0x4440, 0x4480, 0x44c0, short(0x8000), short(0xc300), short(0xc380),
          short(0xc3c0), short(0xc400), short(0xc440), short(0xc480), short(0xc4c0)));
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(half[j / 4], unsigned(j % 4 * 4)), e2m1);
    }
  };
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

  struct Chunk {
    const uint8_t* values;
    __m512 unit, scale;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t* scales) : values(codes), scale(_mm512_set1_ps(1)) {
      float step;
      std::memcpy(&step, scales, 4);
      unit = _mm512_set1_ps(256 * step);
    }

    // The conversion rounds to bfloat16 as the format says.
    DSV32_INLINE __m512i vector(int j) const {
      return (__m512i)_mm512_cvtne2ps_pbh(decode(values + 32 * j + 16, unit), decode(values + 32 * j, unit));
    }
  };
};

struct Bf16 : Bf16X {
  static constexpr int kChunk = 128, kBytes = 256, kScaled = 128, kScaleBytes = 0;
  static void pack_chunk(const uint16_t* x, uint16_t* packed) { std::memcpy(packed, x, 2 * kChunk); }

  struct Chunk {
    const uint8_t* values;
    __m512 scale;

    Chunk() = default;
    DSV32_INLINE Chunk(const uint8_t* codes, const uint8_t*) : values(codes), scale(_mm512_set1_ps(1)) {}
    DSV32_INLINE __m512i vector(int j) const { return _mm512_loadu_si512(values + 64 * j); }
  };
};

struct Simd {
  using Vector = __m512;
  using X = uint16_t;
  using Units = __m512i;
  static constexpr int kLanes = 16, kPair = 2, kColumns = 4;
  static constexpr int kUnits = 32, kRows = 8;
  static constexpr int outputs(int) { return 2; }

  static Units units(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static Vector dot(Vector sum, Units w, Units x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static Vector fma(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
  static void totals(const Vector* sums, float* to) {
    __m256 half[8];
    for (int i = 0; i < 8; ++i)
      half[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm512_extractf32x8_ps(sums[i], 1));
    avx2::totals(half, to);
  }

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
