// Threads of our own, for work that does not come from XLA's CPU backend. They look for work for a while before they
// sleep, as the next layer's comes a fraction of a millisecond later; two cores are left to those who bring it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace dsv32 {

inline int64_t count_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class Threads {
 public:
  // They are never joined: a process ends while they sleep.
  static Threads& all() {
    static Threads& threads = *new Threads(std::max<int64_t>(1, count_cores() - 2));
    return threads;
  }

  // `count` with the caller. Where the system starts no more threads, those that it started do the work, if need be the caller alone.
  explicit Threads(int64_t count) {
    try {
      for (; count_ < count; ++count_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  int64_t num_threads() const { return count_; }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      waiting_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_one();
  }

 private:
  static constexpr std::chrono::microseconds kAwake{1000};

  void work() {
    for (;;) {
      const auto end = std::chrono::steady_clock::now() + kAwake;
      while (waiting_.load(std::memory_order_acquire) == 0 && std::chrono::steady_clock::now() < end)
        for (int i = 0; i < 64; ++i) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return !tasks_.empty(); });
      --asleep_;
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      waiting_.fetch_sub(1);
      lock.unlock();
      task();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int64_t count_ = 1;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::atomic<int64_t> waiting_{0}, asleep_{0};
};

}  // namespace dsv32
