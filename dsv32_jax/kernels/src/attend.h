// Sparse attention: out[g, h, :] is the sum of the latents in the slots of query g, weighted by the softmax of head h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "call.h"
#include "parallel.h"

namespace dsv32 {

enum class Storage { kFloat32, kBf16, kFp8 };

// A pool of vectors of `size` values; FP8 has a scale for every 128 of them.
struct Vectors {
  const void* values;
  const float* scales;
  Storage storage;
  int64_t size;
};

struct Attention {
  int64_t queries, heads, count;
  const void *q_c, *q_r;  // [queries, heads, latent.size], [queries, heads, rotated.size]: bfloat16 or float32
  bool q_is_bf16;
  Vectors latent, rotated;
  const int32_t* slot;  // [queries, count]; -1 is none
  float scale;
  float* out;  // [queries, heads, latent.size]
};

using Attend = void (*)(const Attention&, int64_t query, int64_t first, int64_t last);

constexpr int64_t kHeads = 4;  // heads that are computed together

// A thread takes all heads of a query, or a part of them where there are fewer queries than threads.
template <class Pool>
void run_attention(Pool& pool, Attend attend, const Attention& call) {
  if (call.queries == 0) return;
  const int64_t wanted = (pool.num_threads() + call.queries - 1) / call.queries;
  const int64_t each = std::max((call.heads / wanted + kHeads - 1) / kHeads * kHeads, 4 * kHeads);
  const int64_t parts = (call.heads + each - 1) / each;
  parallel(pool, call.queries * parts, [&](int64_t item, int64_t) {
    const int64_t first = item % parts * each;
    attend(call, item / parts, first, std::min(first + each, call.heads));
  });
}

// 2^f for |f| <= 1/2, highest power first: ln(2)^n / n!.
constexpr float kExp2[7] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};

// What a thread works with, kept for its next call.
struct Scratch {
  std::vector<int32_t> slots;
  std::vector<uint32_t> queries, rows, keys, values, weights;
  std::vector<float> scores, floats;
};

inline Scratch& scratch() {
  static thread_local Scratch found;
  return found;
}

}  // namespace dsv32
