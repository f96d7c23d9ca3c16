// A call on a pool of threads, which is XLA's own: anything with `num_threads` and `Schedule`.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "call.h"

namespace dsv32 {

// Runs work(item, next) for items 0..items-1 on the pool and the calling thread; `next` is what the same thread takes
// next, none where it is not below `items`. The caller waits only for those who have begun: a pool whose threads all
// wait for one another would never begin. What an item throws, on whatever thread, ends the work and leaves here.
template <class Pool, class Work>
void parallel(Pool& pool, int64_t items, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable idle;
    int64_t busy = 0;
    bool closed = false;
    std::exception_ptr fault;
  };
  auto shared = std::make_shared<Shared>();
  const auto take = [items, &work](Shared& shared) {
    try {
      for (int64_t i = shared.next.fetch_add(1), then; i < items; i = then) {
        then = shared.next.fetch_add(1);
        work(i, then);
      }
    } catch (...) {
      shared.next = items;
      std::lock_guard<std::mutex> lock(shared.mutex);
      shared.fault = std::current_exception();
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
  if (shared->fault) std::rethrow_exception(shared->fault);
}

constexpr int64_t kPackedBytes = 32 << 20;  // of groups that are worked on together, unless one has more

constexpr int64_t kGroupRows = 32;  // whose x stays in the second-level cache while all outputs are computed

// The rows of a call by matrix, up to kGroupRows in a group. `order` holds the rows that the groups point to.
inline std::vector<Group> group_rows(const Call& call, std::vector<int64_t>& order) {
  std::vector<int64_t> end(size_t(call.experts) + 1);
  const auto has_matrix = [&](int64_t block) { return call.expert[block] >= 0 && call.expert[block] < call.experts; };
  for (int64_t i = 0; i < call.n; ++i)
    if (has_matrix(i)) end[size_t(call.expert[i]) + 1] += call.b;
  for (size_t e = 0; e < size_t(call.experts); ++e) end[e + 1] += end[e];
  order.resize(size_t(end.back()));
  std::vector<Group> groups;
  for (size_t e = 0; e < size_t(call.experts); ++e)
    for (int64_t first = end[e]; first < end[e + 1]; first += kGroupRows)
      groups.push_back({int64_t(e), order.data() + first, std::min(kGroupRows, end[e + 1] - first)});
  for (int64_t i = 0; i < call.n; ++i)
    for (int64_t row = i * call.b; row < (i + 1) * call.b; ++row)
      if (has_matrix(i)) order[size_t(end[size_t(call.expert[i])]++)] = row;
      else std::memset(call.y + row * call.o, 0, size_t(call.o) * sizeof(float));
  return groups;
}

template <class Pool>
void run(Pool& pool, const Kernel& kernel, const Call& call) {
  std::vector<int64_t> order;
  const std::vector<Group> groups = group_rows(call, order);
  const int64_t row_size = (kernel.row_size(call) + 63) / 64 * 64, tiles = (call.o + kernel.tile - 1) / kernel.tile;
  for (size_t first = 0, last; first < groups.size(); first = last) {
    int64_t packed_rows = groups[first].count;
    for (last = first + 1; last < groups.size() && (packed_rows + groups[last].count) * row_size <= kPackedBytes; ++last)
      packed_rows += groups[last].count;
    const auto count = int64_t(last - first);
    std::unique_ptr<uint8_t[]> buffer(new uint8_t[size_t(packed_rows * row_size + 64)]);
    uint8_t* base = buffer.get() + (64 - reinterpret_cast<uintptr_t>(buffer.get()) % 64);
    const auto packed = [&](const Group& group) { return base + (group.row - groups[first].row) * row_size; };
    parallel(pool, count, [&](int64_t item, int64_t) {
      const Group& group = groups[first + size_t(item)];
      kernel.pack(call, group, packed(group));
    });
    const auto part = [&](int64_t item) {
      if (item >= count * tiles) return Part{};
      const int64_t o = item % tiles * kernel.tile;
      return Part{&groups[first + size_t(item / tiles)], o, std::min(o + kernel.tile, call.o)};
    };
    parallel(pool, count * tiles, [&](int64_t item, int64_t next) {
      const Part now = part(item);
      kernel.rows(call, packed(*now.group), now, part(next));
    });
  }
}

}  // namespace dsv32
