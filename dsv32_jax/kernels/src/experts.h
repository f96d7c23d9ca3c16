// Experts whose matrices stay in the host's memory, applied to the activations of whatever device.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "choose.h"
#include "parallel.h"

namespace dsv32 {

// Matrices [count, o, k] of one format. Their ids are first, first + 1, ...
struct Bank {
  int32_t format;
  int32_t first;
  int64_t count, o, k, row_bytes, scale_bytes;
  const uint8_t *weights, *scales;  // scales: nothing for bfloat16
  const float* tensor_scale;        // [count], NVFP4 only
};

// The banks that Python has handed over, until it takes them back.
class Banks {
 public:
  static Banks& all() {
    static Banks banks;
    return banks;
  }

  int32_t add(Bank bank) {
    std::lock_guard<std::mutex> lock(mutex_);
    bank.first = next_;
    next_ += int32_t(bank.count);
    banks_[bank.first] = bank;
    return bank.first;
  }

  void remove(int32_t first) {
    std::lock_guard<std::mutex> lock(mutex_);
    banks_.erase(first);
  }

  // The bank of the first id that is one; none if there is no id.
  Bank find(const int32_t* ids, int64_t count) {
    int64_t i = 0;
    while (i < count && ids[i] < 0) ++i;
    if (i == count) return Bank{};
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = banks_.upper_bound(ids[i]);
    if (after == banks_.begin() || ids[i] - std::prev(after)->first >= std::prev(after)->second.count)
      throw std::runtime_error("matrix " + std::to_string(ids[i]) + " is not in host memory: its model was freed");
    return std::prev(after)->second;
  }

 private:
  std::mutex mutex_;
  std::map<int32_t, Bank> banks_;
  int32_t next_ = 0;
};

// What a layer's experts are applied to: x [tokens, k], bfloat16 or float32, and for each of a token's `each` experts
// the ids of its gate, up and down matrices [3, tokens, each], -1 for none, and how much its output counts.
struct Mixture {
  int64_t tokens, each, k;
  const void* x;
  bool x_is_bf16;
  const int32_t* ids;
  const float* share;  // [tokens, each]
};

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Memory that is kept from one use to the next: fresh memory costs more than the work of a few tokens.
class Kept {
 public:
  template <class T>
  T* take(int which, int64_t count) {
    auto& [memory, size] = parts_[which];
    const size_t needed = size_t(count) * sizeof(T) + 64;
    if (size < needed) memory.reset(new uint8_t[needed]), size = needed;
    return reinterpret_cast<T*>(memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64));
  }

 private:
  std::pair<std::unique_ptr<uint8_t[]>, size_t> parts_[8];
};

// The product of rows x with matrices of one bank, one each: y [n, o], without the tensor scale.
inline Call call_of(const Bank& bank, const void* x, bool x_is_bf16, const std::vector<int32_t>& id, float* y) {
  Call call{};
  call.n = int64_t(id.size()), call.b = 1, call.o = bank.o, call.k = bank.k, call.experts = bank.count;
  call.x = x, call.x_is_bf16 = x_is_bf16, call.expert = id.data();
  call.weights = bank.weights, call.row_bytes = bank.row_bytes;
  call.scales = bank.scales, call.scale_bytes = bank.scale_bytes;
  call.y = y;
  return call;
}

// Computes calls that have the same x, experts and shapes at once.
template <class Pool>
void multiply(Pool& pool, const Kernel& kernel, const std::vector<Call>& calls, uint8_t* packed) {
  std::vector<int64_t> order;
  const std::vector<Group> groups = group_rows(calls[0], order);
  const int64_t row_size = (kernel.row_size(calls[0]) + 63) / 64 * 64;
  const int64_t tiles = (calls[0].o + kernel.tile - 1) / kernel.tile, each = int64_t(groups.size()) * tiles;
  const auto place = [&](const Group& group) { return packed + (group.row - order.data()) * row_size; };
  parallel(pool, int64_t(groups.size()), [&](int64_t i, int64_t) {
    kernel.pack(calls[0], groups[size_t(i)], place(groups[size_t(i)]));
  });
  const auto part = [&](int64_t item) {
    const int64_t o = item % tiles * kernel.tile;
    return Part{&groups[size_t(item % each / tiles)], o, std::min(o + kernel.tile, calls[0].o)};
  };
  parallel(pool, each * int64_t(calls.size()), [&](int64_t item, int64_t next) {
    const bool same = next < each * int64_t(calls.size()) && next / each == item / each;
    const Part now = part(item);
    kernel.rows(calls[size_t(item / each)], place(*now.group), now, same ? part(next) : Part{});
  });
}

// y [tokens, o] = sum over a token's experts of share * down(silu(gate(x)) * up(x)); as experts.py, in the same order.
template <class Pool>
void mix(Pool& pool, const Mixture& in, int64_t outputs, float* y, Kept& kept) {
  const int64_t n = in.tokens * in.each, size = in.x_is_bf16 ? 2 : 4, row = in.k * size;
  Bank bank[3];
  std::vector<int32_t> id[3];
  for (int m = 0; m < 3; ++m) {
    bank[m] = Banks::all().find(in.ids + m * n, n);
    id[m].resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) id[m][size_t(i)] = in.ids[m * n + i] < 0 ? -1 : in.ids[m * n + i] - bank[m].first;
  }
  const Bank &gate = bank[0], &up = bank[1], &down = bank[2];
  if (gate.count == 0) {
    std::memset(y, 0, size_t(in.tokens * outputs) * sizeof(float));
    return;
  }
  if (gate.k != in.k || up.k != in.k || up.o != gate.o || down.k != gate.o || down.o != outputs)
    throw std::runtime_error("the matrices of the experts do not fit together");
  auto* x = kept.take<uint8_t>(0, n * row);
  auto* hidden = kept.take<uint8_t>(1, n * gate.o * size);
  auto *g = kept.take<float>(2, n * gate.o), *u = kept.take<float>(3, n * gate.o);
  auto* z = kept.take<float>(4, n * outputs);
  auto* packed = kept.take<uint8_t>(5, n * (std::max(in.k, gate.o) + 256) * 4);
  const auto scale = [&](int m, int64_t i) {
    const int32_t e = id[m][size_t(i)];
    return bank[m].tensor_scale == nullptr || e < 0 ? 1.0f : bank[m].tensor_scale[e];
  };
  for (int64_t i = 0; i < n; ++i) std::memcpy(x + i * row, static_cast<const uint8_t*>(in.x) + i / in.each * row, size_t(row));
  const auto kernel_of = [&](const Bank& one) { return choose(Format(one.format), in.x_is_bf16); };
  const Call first = call_of(gate, x, in.x_is_bf16, id[0], g), second = call_of(up, x, in.x_is_bf16, id[1], u);
  if (gate.format == up.format && id[0] == id[1]) {
    multiply(pool, kernel_of(gate), {first, second}, packed);
  } else {
    multiply(pool, kernel_of(gate), {first}, packed);
    multiply(pool, kernel_of(up), {second}, packed);
  }
  parallel(pool, n, [&](int64_t i, int64_t) {
    const float g_scale = scale(0, i), u_scale = scale(1, i);
    for (int64_t j = i * gate.o; j < (i + 1) * gate.o; ++j) {
      const float a = g[j] * g_scale, h = a / (1 + std::exp(-a)) * (u[j] * u_scale);
      if (in.x_is_bf16)
        reinterpret_cast<uint16_t*>(hidden)[j] = to_bf16(h);
      else
        reinterpret_cast<float*>(hidden)[j] = h;
    }
  });
  multiply(pool, kernel_of(down), {call_of(down, hidden, in.x_is_bf16, id[2], z)}, packed);
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (outputs + kPiece - 1) / kPiece;
  parallel(pool, in.tokens * pieces, [&](int64_t item, int64_t) {
    const int64_t t = item / pieces, end = std::min((item % pieces + 1) * kPiece, outputs);
    for (int64_t j = item % pieces * kPiece; j < end; ++j) {
      float sum = 0;
      for (int64_t i = t * in.each; i < (t + 1) * in.each; ++i) sum += in.share[i] * (z[i * outputs + j] * scale(2, i));
      y[t * outputs + j] = sum;
    }
  });
}

}  // namespace dsv32
