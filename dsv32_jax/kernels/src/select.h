// Top-k as a selection: the positions of a query's largest scores, without sorting them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"

namespace dsv32 {

// An unsigned integer of the score's rank: 0 for -inf, the largest for NaN, and the same for both zeros.
inline uint32_t rank(float score) {
  if (std::isnan(score)) return std::numeric_limits<uint32_t>::max();
  if (score == -std::numeric_limits<float>::infinity()) return 0;
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Writes the positions of the `count` largest of n scores, of equal ones the lower, in rising order; then -1.
inline void select(const float* score, int64_t n, int64_t count, int32_t* selected) {
  static thread_local std::vector<uint32_t> ranks, order;
  ranks.resize(size_t(n));
  std::transform(score, score + n, ranks.begin(), rank);
  uint32_t least = 0;
  if (n > count) {
    order = ranks;
    std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<>());
    least = order[size_t(count - 1)];
  }
  int64_t ties = count - std::count_if(ranks.begin(), ranks.end(), [=](uint32_t one) { return one > least; });
  int32_t* end = selected;
  for (int64_t i = 0; i < n; ++i)
    if (ranks[size_t(i)] > least || (ranks[size_t(i)] == least && least > 0 && ties-- > 0)) *end++ = int32_t(i);
  std::fill(end, selected + count, -1);
}

// For `queries` rows of `size` scores, of which those up to the query's position count.
template <class Pool>
void run_select(Pool& pool, const float* score, int64_t size, const int32_t* position, int64_t queries, int64_t count,
                int32_t* selected) {
  parallel(pool, queries, [=](int64_t g, int64_t) {
    select(score + g * size, std::clamp<int64_t>(int64_t(position[g]) + 1, 0, size), count, selected + g * count);
  });
}

}  // namespace dsv32
