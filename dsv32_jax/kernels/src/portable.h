// Any processor: the formats said plainly.
#pragma once

#include <cmath>
#include <cstring>

#include "ahead.h"
#include "call.h"

namespace dsv32::portable {

struct Lanes {
  float lane[8];
};

struct Float32X {
  using X = float;
  using Vector = Lanes;
  static constexpr int order(int i) { return i; }
  static float packed(const Call& call, int64_t index) { return x_at(call, index); }

  static void totals(const Lanes* sums, float* to) {
    for (int i = 0; i < 8; ++i) {
      to[i] = 0;
      for (float part : sums[i].lane) to[i] += part;
    }
  }

  template <int R, int N>
  static void multiply(const float* w, const float* x, Lanes* sums) {
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < N; j += 8)
        for (int l = 0; l < 8; ++l) sums[r].lane[l] += w[j + l] * x[r * N + j + l];
  }
};

inline float e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = (code & 0x7f) == 0x7f ? NAN
                          : exponent            ? std::ldexp(float(8 + mantissa), exponent - 10)
                                                : std::ldexp(float(mantissa), -9);
  return code & 0x80 ? -magnitude : magnitude;
}

struct E4m3 {
  float value[256];
  E4m3() {
    for (int code = 0; code < 256; ++code) value[code] = e4m3(uint8_t(code));
  }
};
inline const E4m3 kE4m3;

struct Nvfp4 : Float32X {
  using Scale = uint8_t;
  static constexpr int kChunk = 16, kBytes = 8, kScales = 1;

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    const int64_t width = call.k / call.row_scales;
    for (int64_t c = 0; c < chunks; ++c) {
      const float value = kE4m3.value[call.scales[row * call.row_scales + (start + c) * kChunk / width]];
      scale[c] = std::isnan(value) ? 448 : value;
    }
  }

  template <int R>
  static void add(const uint8_t* codes, const float* scale, const float* x, Lanes* sums) {
    static constexpr float kE2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    float w[kChunk];
    for (int i = 0; i < kBytes; ++i) {
      w[2 * i] = kE2m1[codes[i] & 15] * *scale;
      w[2 * i + 1] = kE2m1[codes[i] >> 4] * *scale;
    }
    multiply<R, kChunk>(w, x, sums);
  }
};

struct Fp8 : Float32X {
  using Scale = float;
  static constexpr int kChunk = 64, kBytes = 64, kScales = 1;

  static void scales(const Call& call, int64_t row, int64_t start, int64_t chunks, float* scale) {
    const float* blocks = reinterpret_cast<const float*>(call.scales) + row * call.row_scales;
    for (int64_t c = 0; c < chunks; ++c) scale[c] = blocks[(start + c) * kChunk / 128];
  }

  // To bfloat16, ties to even.
  static float rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return std::isnan(value) ? value : from_bf16(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
  }

  template <int R>
  static void add(const uint8_t* values, const float* scale, const float* x, Lanes* sums) {
    float w[kChunk];
    for (int i = 0; i < kChunk; ++i) w[i] = rounded(kE4m3.value[values[i]] * *scale);
    multiply<R, kChunk>(w, x, sums);
  }
};

struct Bf16 : Float32X {
  using Scale = uint8_t;
  static constexpr int kChunk = 64, kBytes = 128, kScales = 0;
  static void scales(const Call&, int64_t, int64_t, int64_t, float*) {}

  template <int R>
  static void add(const uint8_t* values, const float*, const float* x, Lanes* sums) {
    float w[kChunk];
    uint16_t bits[kChunk];
    std::memcpy(bits, values, kBytes);
    for (int i = 0; i < kChunk; ++i) w[i] = from_bf16(bits[i]);
    multiply<R, kChunk>(w, x, sums);
  }
};

#include "rows.inc"

}  // namespace dsv32::portable
