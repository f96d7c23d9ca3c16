// Any processor: the formats said plainly.
#pragma once

#include <cmath>
#include <cstring>

#include "ahead.h"
#include "attend.h"
#include "call.h"

namespace dsv32::portable {

struct Lanes {
  float lane[8];
};

struct Float32X {
  using X = float;
  static constexpr int order(int i) { return i; }
  static float packed(const Call& call, int64_t index) { return x_at(call, index); }
};

// Weights with their scales.
template <int N>
struct Weights {
  float weight[N];
  Lanes scale = {1, 1, 1, 1, 1, 1, 1, 1};

  Lanes vector(int j) const {
    Lanes lanes;
    std::memcpy(&lanes, weight + 8 * j, sizeof lanes);
    return lanes;
  }
};

// To bfloat16, ties to even.
inline float rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? value : from_bf16(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

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
  static constexpr int kChunk = 16, kBytes = 8, kScaled = 16, kScaleBytes = 1;

  struct Chunk : Weights<kChunk> {
    Chunk() = default;
    Chunk(const uint8_t* codes, const uint8_t* scales) {
      static constexpr float kE2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
      const float stored = kE4m3.value[*scales], step = std::isnan(stored) ? 448 : stored;
      for (int i = 0; i < kBytes; ++i) {
        weight[2 * i] = kE2m1[codes[i] & 15] * step;
        weight[2 * i + 1] = kE2m1[codes[i] >> 4] * step;
      }
    }
  };
};

struct Fp8 : Float32X {
  static constexpr int kChunk = 128, kBytes = 128, kScaled = 128, kScaleBytes = 4;

  struct Chunk : Weights<kChunk> {
    Chunk() = default;
    Chunk(const uint8_t* codes, const uint8_t* scales) {
      float step;
      std::memcpy(&step, scales, 4);
      for (int i = 0; i < kChunk; ++i) weight[i] = rounded(kE4m3.value[codes[i]] * step);
    }
  };
};

struct Bf16 : Float32X {
  static constexpr int kChunk = 64, kBytes = 128, kScaled = 64, kScaleBytes = 0;

  struct Chunk : Weights<kChunk> {
    Chunk() = default;
    Chunk(const uint8_t* codes, const uint8_t*) {
      uint16_t bits[kChunk];
      std::memcpy(bits, codes, kBytes);
      for (int i = 0; i < kChunk; ++i) weight[i] = from_bf16(bits[i]);
    }
  };
};

struct Simd {
  using Vector = Lanes;
  using X = float;
  using Units = Lanes;
  static constexpr int kLanes = 8, kPair = 1, kColumns = 1;
  static constexpr int kUnits = 8, kRows = 8;
  static constexpr int outputs(int) { return 1; }

  template <class F>
  static Lanes each(F f) {
    Lanes result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }

  static Lanes load(const void* from) {
    Lanes result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
  static void store(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }
  static Lanes set(float value) { return each([&](int) { return value; }); }
  static Lanes add(Lanes a, Lanes b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static Lanes max(Lanes a, Lanes b) { return each([&](int i) { return std::max(a.lane[i], b.lane[i]); }); }
  static Lanes exp2(Lanes v) { return each([&](int i) { return std::exp2(v.lane[i]); }); }

  static Lanes units(const float* x) { return load(x); }
  static Lanes dot(Lanes sum, Lanes w, Lanes x) { return fma(w, x, sum); }
  static Lanes fma(Lanes a, Lanes b, Lanes sum) {
    return each([&](int i) { return sum.lane[i] + a.lane[i] * b.lane[i]; });
  }
  static void totals(const Lanes* sums, float* to) {
    for (int i = 0; i < 8; ++i) {
      to[i] = 0;
      for (float part : sums[i].lane) to[i] += part;
    }
  }

  static Lanes scaled(Lanes v, float least, float scale) {
    return each([&](int i) { return (v.lane[i] - least) * scale; });
  }

  static Lanes multiply(Lanes sum, Lanes units, const uint32_t* one) {
    float value;
    std::memcpy(&value, one, 4);
    return each([&](int i) { return sum.lane[i] + units.lane[i] * value; });
  }

  static void read(const Vectors& from, int64_t row, bool as_bf16, float* to) {
    const int64_t start = row * from.size, scales = (from.size + 127) / 128;
    for (int64_t i = 0; i < from.size; ++i) {
      to[i] = from.storage == Storage::kFloat32 ? static_cast<const float*>(from.values)[start + i]
              : from.storage == Storage::kBf16  ? from_bf16(static_cast<const uint16_t*>(from.values)[start + i])
                                                : kE4m3.value[static_cast<const uint8_t*>(from.values)[start + i]] *
                                                     from.scales[row * scales + i / 128];
      if (as_bf16) to[i] = rounded(to[i]);
    }
  }

  static void pair(const float* rows, int64_t, int64_t count, uint32_t* units) {
    std::memcpy(units, rows, size_t(count) * 4);
    std::fill(units + count, units + 64, 0);
  }

  static void weights(const float* score, int64_t count, float factor, bool as_bf16, uint32_t* units) {
    for (int64_t i = 0; i < count; ++i) {
      const float weight = as_bf16 ? rounded(score[i] * factor) : score[i] * factor;
      std::memcpy(units + i, &weight, 4);
    }
  }
};

#include "attend.inc"
#include "rows.inc"

}  // namespace dsv32::portable
