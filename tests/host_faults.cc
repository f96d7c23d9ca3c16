// Work that throws, and threads that do not start: the caller learns it, the others end, and nothing hangs.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include <dlfcn.h>
#include <pthread.h>

#include "../dsv32_jax/kernels/src/parallel.h"
#include "../dsv32_jax/kernels/src/threads.h"

int started = 0, most_threads = 0;

// In the place of the system's: more threads than `most_threads` do not start.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* with) {
  if (started == most_threads) return EAGAIN;
  ++started;
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  return create(thread, how, run, with);
}

void require(bool holds, const char* what) {
  if (!holds) std::printf("not so: %s\n", what), std::exit(1);
}

int main(int, char** arguments) {
  most_threads = std::atoi(arguments[1]);
  auto& pool = *new dsv32::Threads(4);  // whose threads never end
  require(pool.num_threads() == std::min(most_threads, 3) + 1, "the pool knows how many threads it has");
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> done{0}, running{0};
    std::string why;
    try {
      dsv32::parallel(pool, 64, [&](int64_t item, int64_t) {
        ++running;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (item == round % 64) --running, throw std::runtime_error("item " + std::to_string(item));
        ++done, --running;
      });
    } catch (const std::runtime_error& error) {
      why = error.what();
    }
    require(why == "item " + std::to_string(round % 64), "the caller is told why");
    require(running == 0 && done < 64, "nobody works any more");
    done = 0;
    dsv32::parallel(pool, 64, [&](int64_t, int64_t) { ++done; });
    require(done == 64, "the next work is done whole");
  }
}
