// A call on a pool of threads, which is XLA's own: anything with `num_threads` and `Schedule`.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "call.h"

namespace dsv32 {

// Runs work(item, next) for items 0..items-1 on the pool and the calling thread; `next` is what the same thread takes
// next, none where it is not below `items`. The caller waits only for those who have begun: a pool whose threads all
// wait for one another would never begin.
template <class Pool, class Work>
void parallel(Pool& pool, int64_t items, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable idle;
    int64_t busy = 0;
    bool closed = false;
  };
  auto shared = std::make_shared<Shared>();
  const auto take = [items, &work](Shared& shared) {
    for (int64_t i = shared.next.fetch_add(1), then; i < items; i = then) {
      then = shared.next.fetch_add(1);
      work(i, then);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), items) - 1;
  for (int64_t h = 0; h < helpers; ++h)
    pool.Schedule([shared, take] {
      {
        std::lock_guard<std::mutex> lock(shared->mutex);
        if (shared->closed) return;
        ++shared->busy;
      }
      take(*shared);
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (--shared->busy == 0) shared->idle.notify_one();
    });
  take(*shared);
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->closed = true;
  shared->idle.wait(lock, [&] { return shared->busy == 0; });
}

constexpr int64_t kPackedBytes = 32 << 20;  // of blocks that are worked on together, unless one has more

template <class Pool>
void run(Pool& pool, const Kernel& kernel, const Call& call) {
  const auto each = int64_t(kernel.packed_bytes(call) + 63) / 64 * 64;
  const int64_t together = std::clamp<int64_t>(kPackedBytes / each, 1, call.n);
  const int64_t tiles = (call.o + kernel.tile - 1) / kernel.tile;
  std::vector<uint8_t> packed(size_t(each * together + 64));
  uint8_t* base = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64);
  for (int64_t start = 0; start < call.n; start += together) {
    const int64_t count = std::min(together, call.n - start);
    parallel(pool, count, [&](int64_t i, int64_t) { kernel.pack(call, start + i, base + i * each); });
    const auto part = [&](int64_t item) {
      if (item >= count * tiles) return Part{};
      const int64_t first = item % tiles * kernel.tile;
      return Part{start + item / tiles, first, std::min(first + kernel.tile, call.o)};
    };
    parallel(pool, count * tiles, [&](int64_t item, int64_t next) {
      kernel.rows(call, base + item / tiles * each, part(item), part(next));
    });
  }
}

}  // namespace dsv32
