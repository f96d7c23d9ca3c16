// The few functions of NVIDIA's driver that the host needs, found when they are first used: building takes no CUDA.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dsv32 {

class Cuda {
 public:
  static const Cuda& driver() {
    static const Cuda cuda;
    return cuda;
  }

  void copy_to_host(void* to, const void* from, size_t size, void* stream) const {
    check(to_host_(to, address(from), size, stream), "copying to the host");
  }
  void copy_to_device(void* to, const void* from, size_t size, void* stream) const {
    check(to_device_(address(to), from, size, stream), "copying to the device");
  }
  void call_host(void* stream, void (*function)(void*), void* argument) const {
    check(call_host_(stream, function, argument), "calling the host");
  }
  void wait(void* stream) const { check(wait_(stream), "waiting for a stream"); }

  // Pinned memory of at least `size` bytes, the same for all work of a stream, which takes its turn.
  void* staging(void* stream, size_t size) const {
    static std::mutex mutex;
    static std::map<void*, std::pair<void*, size_t>> memory;
    std::lock_guard<std::mutex> lock(mutex);
    auto& [there, many] = memory[stream];
    if (many < size) {
      if (there != nullptr) wait(stream), free_(there);
      there = allocate(size), many = size;
    }
    return there;
  }

  void* allocate(size_t size) const {
    void* memory = nullptr;
    check(allocate_(&memory, size, 1 /* for all contexts */), "pinning memory");
    return memory;
  }

  void* make_event() const {
    void* event = nullptr;
    check(make_event_(&event, 2 /* without timing */), "making an event");
    return event;
  }
  void record(void* event, void* stream) const { check(record_(event, stream), "recording an event"); }
  void wait_for(void* event) const { check(wait_for_(event), "waiting for an event"); }

 private:
  using Address = unsigned long long;
  static Address address(const void* pointer) { return reinterpret_cast<Address>(pointer); }

  Cuda() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw std::runtime_error("libcuda.so.1 is missing");
    find(library, "cuMemcpyDtoHAsync_v2", to_host_);
    find(library, "cuMemcpyHtoDAsync_v2", to_device_);
    find(library, "cuLaunchHostFunc", call_host_);
    find(library, "cuStreamSynchronize", wait_);
    find(library, "cuMemHostAlloc", allocate_);
    find(library, "cuMemFreeHost", free_);
    find(library, "cuEventCreate", make_event_);
    find(library, "cuEventRecord", record_);
    find(library, "cuEventSynchronize", wait_for_);
  }

  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string(name) + " is missing in libcuda.so.1");
  }

  static void check(int status, const char* what) {
    if (status == 2) throw std::bad_alloc();
    if (status != 0) throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(status));
  }

  int (*to_host_)(void*, Address, size_t, void*);
  int (*to_device_)(Address, const void*, size_t, void*);
  int (*call_host_)(void*, void (*)(void*), void*);
  int (*wait_)(void*);
  int (*allocate_)(void**, size_t, unsigned);
  int (*free_)(void*);
  int (*make_event_)(void**, unsigned);
  int (*record_)(void*, void*);
  int (*wait_for_)(void*);
};

// Buffers of pinned memory that are filled in turn while a stream copies the others to its device.
class Pipe {
 public:
  static constexpr size_t kBytes = 64 << 20;

  static Pipe& of(void* stream) {
    static std::mutex mutex;
    static std::map<void*, std::unique_ptr<Pipe>> pipes;
    std::lock_guard<std::mutex> lock(mutex);
    auto& pipe = pipes[stream];
    if (pipe == nullptr) pipe.reset(new Pipe(stream));
    return *pipe;
  }

  // A buffer whose content has been copied.
  uint8_t* next() {
    turn_ = (turn_ + 1) % kBuffers;
    Cuda::driver().wait_for(event_[turn_]);
    return memory_[turn_];
  }

  // The copy of the last buffer is in the stream.
  void sent() { Cuda::driver().record(event_[turn_], stream_); }

 private:
  static constexpr int kBuffers = 2;

  explicit Pipe(void* stream) : stream_(stream) {
    for (int i = 0; i < kBuffers; ++i) {
      memory_[i] = static_cast<uint8_t*>(Cuda::driver().allocate(kBytes));
      event_[i] = Cuda::driver().make_event();
    }
  }

  void* const stream_;
  uint8_t* memory_[kBuffers];
  void* event_[kBuffers];
  int turn_ = 0;
};

}  // namespace dsv32
