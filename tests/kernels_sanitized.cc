// The kernels on threads of their own, in buffers that end where their arrays end: what the sanitizers look at.
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>

#include "../dsv32_jax/kernels/src/parallel.h"
#include "../dsv32_jax/kernels/src/portable.h"
#include "../dsv32_jax/kernels/src/select.h"
#if defined(__x86_64__)
#include "../dsv32_jax/kernels/src/avx2.h"
#include "../dsv32_jax/kernels/src/avx512.h"
#endif

using dsv32::Call;
using dsv32::Kernel;

struct Pool {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 4; }
  void Schedule(std::function<void()> task) { threads.emplace_back(std::move(task)); }
  ~Pool() {
    for (auto& thread : threads) thread.join();
  }
};

std::mt19937 random_bits(1);

int64_t below(int64_t limit) { return int64_t(random_bits() % uint64_t(limit)); }

std::vector<uint8_t> bytes(int64_t count) {
  std::vector<uint8_t> found(static_cast<size_t>(count));
  for (auto& byte : found) byte = uint8_t(random_bits());
  return found;
}

std::vector<uint8_t> numbers(int64_t count, bool as_bf16) {
  std::vector<uint8_t> found(static_cast<size_t>(count * (as_bf16 ? 2 : 4)));
  for (int64_t i = 0; i < count; ++i) {
    const float value = float(below(2001)) / 1000 - 1;
    if (as_bf16) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t half = uint16_t(bits >> 16);
      std::memcpy(found.data() + 2 * i, &half, 2);
    } else {
      std::memcpy(found.data() + 4 * i, &value, 4);
    }
  }
  return found;
}

std::vector<float> result(const Kernel& kernel, Call call) {
  std::vector<float> y(static_cast<size_t>(call.n * call.b * call.o), NAN);
  call.y = y.data();
  Pool pool;
  dsv32::run(pool, kernel, call);
  return y;
}

enum Format { kNvfp4, kFp8, kBf16, kColumns };

// One call of random sizes: the largest difference between two kernels, as a share of the largest result.
double difference(Format format, const Kernel& kernel, const Kernel& plain, bool x_is_bf16) {
  Call call{};
  call.n = 1 + below(4), call.b = 1 + below(18), call.o = 1 + below(90), call.k = 16 * (1 + below(30));
  call.experts = 1 + below(3);
  call.x_is_bf16 = x_is_bf16;
  const auto x = numbers(call.n * call.b * call.k, x_is_bf16);
  std::vector<int32_t> expert;
  for (int64_t i = 0; i < call.n; ++i) expert.push_back(int32_t(below(call.experts + 2)) - 1);
  call.row_bytes = format == kNvfp4 ? call.k / 2 : format == kFp8 ? call.k : 2 * call.k;
  call.scale_bytes = format == kNvfp4 ? call.k / 16 : format == kFp8 ? (call.k + 127) / 128 * 4 : 0;
  auto weights = format >= kBf16 ? numbers(call.experts * call.o * call.k, true)
                                 : bytes(call.experts * call.o * call.row_bytes);
  if (format == kFp8)
    for (auto& byte : weights) byte = (byte & 127) == 127 ? 0 : byte;
  const int64_t scales = call.experts * call.o * call.scale_bytes;
  const auto scale = format == kFp8 ? numbers(scales / 4, false) : bytes(scales);
  call.x = x.data(), call.expert = expert.data(), call.weights = weights.data(), call.scales = scale.data();
  const auto got = result(kernel, call), want = result(plain, call);
  double most = 1e-30, off = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    most = std::max(most, double(std::abs(want[i])));
    off = std::max(off, std::isfinite(got[i]) ? double(std::abs(got[i] - want[i])) : INFINITY);
  }
  return off / most;
}

// Sparse attention of random sizes, in the same way.
double difference(dsv32::Attend attend, bool q_is_bf16) {
  using dsv32::Storage;
  const int64_t slots = 1 + below(150), storage = below(3), size = 1 + below(140), other = 1 + below(20);
  dsv32::Attention call{};
  call.queries = 1 + below(3), call.heads = 1 + below(20), call.count = 1 + below(130), call.q_is_bf16 = q_is_bf16;
  const auto q_c = numbers(call.queries * call.heads * size, q_is_bf16);
  const auto q_r = numbers(call.queries * call.heads * other, q_is_bf16);
  auto latent = storage == 2 ? bytes(slots * size) : numbers(slots * size, storage == 1);
  if (storage == 2)
    for (auto& byte : latent) byte = (byte & 127) == 127 ? 0 : byte;
  std::vector<float> scales(size_t(slots * ((size + 127) / 128)), 1 / 256.f);
  const auto rotated = numbers(slots * other, true);
  std::vector<int32_t> slot;
  for (int64_t i = 0; i < call.queries * call.count; ++i)
    slot.push_back(i % call.count == 0 ? 0 : int32_t(below(slots + 1)) - 1);
  call.q_c = q_c.data(), call.q_r = q_r.data(), call.slot = slot.data(), call.scale = 0.4f;
  call.latent = {latent.data(), scales.data(), Storage(storage), size};
  call.rotated = {rotated.data(), nullptr, Storage::kBf16, other};
  std::vector<float> got(size_t(call.queries * call.heads * size), NAN), want = got;
  const auto run = [&](dsv32::Attend with, std::vector<float>& out) {
    call.out = out.data();
    Pool pool;
    dsv32::run_attention(pool, with, call);
  };
  run(attend, got), run(dsv32::portable::attend, want);
  double most = 1e-30, off = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    most = std::max(most, double(std::abs(want[i])));
    off = std::max(off, std::isfinite(got[i]) ? double(std::abs(got[i] - want[i])) : INFINITY);
  }
  return off / most / (q_is_bf16 ? 1000 : 1);
}

// Selections of random sizes against a sort: how many positions differ.
int wrong_selections() {
  int wrong = 0;
  for (int i = 0; i < 40; ++i) {
    const int64_t size = 1 + below(300), queries = 1 + below(6), count = 1 + below(size);
    std::vector<float> score(size_t(queries * size));
    for (auto& one : score) one = float(below(50)) - 25;
    std::vector<int32_t> position(static_cast<size_t>(queries)), got(size_t(queries * count), -2);
    for (auto& one : position) one = int32_t(below(size));
    Pool pool;
    dsv32::run_select(pool, score.data(), size, position.data(), queries, count, got.data());
    for (auto& thread : pool.threads) thread.join();
    pool.threads.clear();
    for (int64_t g = 0; g < queries; ++g) {
      std::vector<int32_t> want(size_t(position[size_t(g)]) + 1);
      for (size_t s = 0; s < want.size(); ++s) want[s] = int32_t(s);
      std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) {
        return score[size_t(g * size + a)] > score[size_t(g * size + b)];
      });
      want.resize(std::min(want.size(), size_t(count)));
      std::sort(want.begin(), want.end());
      want.resize(size_t(count), -1);
      for (int64_t n = 0; n < count; ++n) wrong += got[size_t(g * count + n)] != want[size_t(n)];
    }
  }
  return wrong;
}

int main() {
  const Kernel plain[] = {dsv32::portable::kernel<dsv32::portable::Nvfp4>(),
                          dsv32::portable::kernel<dsv32::portable::Fp8>(),
                          dsv32::portable::kernel<dsv32::portable::Bf16>(), dsv32::portable::column_kernel()};
  std::vector<std::pair<const Kernel*, bool>> tried = {{plain, false}, {plain, true}};
#if defined(__x86_64__)
  const Kernel usual[] = {dsv32::avx2::kernel<dsv32::avx2::Nvfp4>(), dsv32::avx2::kernel<dsv32::avx2::Fp8>(),
                          dsv32::avx2::kernel<dsv32::avx2::Bf16>(), dsv32::avx2::column_kernel()};
  const Kernel wide[] = {dsv32::avx512::kernel<dsv32::avx512::Nvfp4>(), dsv32::avx512::kernel<dsv32::avx512::Fp8>(),
                         dsv32::avx512::kernel<dsv32::avx512::Bf16>(), dsv32::avx512::column_kernel()};
  if (__builtin_cpu_supports("avx2")) tried.insert(tried.end(), {{usual, false}, {usual, true}});
  if (__builtin_cpu_supports("avx512bf16")) tried.push_back({wide, true});
#endif
  double worst = 0;
  for (const auto& [kernels, x_is_bf16] : tried)
    for (const Format format : {kNvfp4, kFp8, kBf16, kColumns})
      for (int i = 0; i < 6; ++i) worst = std::max(worst, difference(format, kernels[format], plain[format], x_is_bf16));
  std::vector<std::pair<dsv32::Attend, bool>> attention = {{dsv32::portable::attend, true}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) attention.insert(attention.end(), {{dsv32::avx2::attend, false}, {dsv32::avx2::attend, true}});
  if (__builtin_cpu_supports("avx512bf16")) attention.push_back({dsv32::avx512::attend, true});
#endif
  for (const auto& [attend, q_is_bf16] : attention)
    for (int i = 0; i < 6; ++i) worst = std::max(worst, difference(attend, q_is_bf16));
  const int wrong = wrong_selections();
  std::printf("%d kinds, largest difference %.1e, %d positions differ\n", int(tried.size()), worst, wrong);
  return worst < 1e-5 && wrong == 0 ? 0 : 1;
}
