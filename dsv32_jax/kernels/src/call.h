// A call: y[i, :] = W[expert[i / b]] x[i, :] for n blocks of b rows, each block with one of `experts` matrices [o, k].
#pragma once

#include <cstddef>
#include <cstdint>

// Loops over arrays that are to lie in registers have to be unrolled, and what they call inlined.
#define DSV32_INLINE [[gnu::always_inline]] inline
#if defined(__clang__)
#define DSV32_UNROLL _Pragma("unroll")
#else
#define DSV32_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dsv32 {

struct Call {
  int64_t n, b, o, k, experts;
  const void* x;  // [n * b, k], bfloat16 or float32
  bool x_is_bf16;
  const int32_t* expert;   // [n]; an id that is no expert means no matrix: zeros
  const uint8_t* weights;  // [experts, o, row_bytes]
  int64_t row_bytes;
  const uint8_t* scales;  // [experts, o, scale_bytes], in the format's own type; nothing for bfloat16
  int64_t scale_bytes;
  float* y;  // [n * b, o]
};

// The rows of x that have one matrix, from however many blocks.
struct Group {
  int64_t matrix;
  const int64_t* row;
  int64_t count;
};

// Outputs that a thread computes at once: their weights stay in the second-level cache, their sums in the first.
constexpr int64_t kTile = 16, kColumnTile = 512;

// The outputs first..last-1 of a group: what a thread computes at once. Nothing where there is no group.
struct Part {
  const Group* group;
  int64_t first, last;
};

// How one instruction set computes one format. `pack` lays the rows of a group out as `rows` wants them, in a buffer of
// count * `row_size` bytes; `rows` computes a part of at most `tile` outputs, and is told which part the thread computes
// next.
struct Kernel {
  int64_t tile;
  int64_t (*row_size)(const Call&);
  void (*pack)(const Call&, const Group&, void* packed);
  void (*rows)(const Call&, const void* packed, Part part, Part next);
};

inline float from_bf16(uint16_t bits) {
  union { uint32_t u; float f; } value = {uint32_t(bits) << 16};
  return value.f;
}

inline float x_at(const Call& call, int64_t index) {
  return call.x_is_bf16 ? from_bf16(static_cast<const uint16_t*>(call.x)[index])
                        : static_cast<const float*>(call.x)[index];
}

}  // namespace dsv32
