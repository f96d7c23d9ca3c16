// Experts in host memory as calls of XLA: on its CPU backend, and on NVIDIA GPUs by functions of the host in a stream.
#include "cuda.h"
#include "experts.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dsv32 {

constexpr size_t kCopied = 1 << 20;  // bytes that a thread copies at a time

using Ids = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

// Does what can throw, which a call of XLA or of a stream must not; returns why it failed, if it did.
template <class Work>
ffi::Error report_failure(const Work& work) {
  const std::string where = "experts in host memory: ";
  try {
    work();
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, where + "the host is out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(where + error.what());
  }
}

Mixture mixture(const ffi::AnyBuffer& x, const Ids& ids, const Floats& share) {
  Mixture in{};
  in.tokens = x.dimensions()[0], in.k = x.dimensions()[1], in.each = share.dimensions()[1];
  in.x = x.untyped_data(), in.x_is_bf16 = x.element_type() == ffi::BF16;
  in.ids = ids.typed_data(), in.share = share.typed_data();
  return in;
}

ffi::Error mix_on_cpu(ffi::ThreadPool pool, ffi::AnyBuffer x, Ids ids, Floats share, ffi::Result<Floats> y) {
  return report_failure([&] {
    Kept kept;
    mix(pool, mixture(x, ids, share), y->dimensions()[1], y->typed_data(), kept);
  });
}

// Work that a stream hands to the host: activations have been copied to `memory`, and results are copied from there.
struct Work {
  Mixture in;
  int64_t outputs;
  float* y;
};

// Why work in a stream failed since somebody asked.
class LastError {
 public:
  static LastError& all() {
    static LastError last;
    return last;
  }
  void set(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    text_ = text;
  }
  std::string take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(text_, "");
  }

 private:
  std::mutex mutex_;
  std::string text_;
};

// An exception cannot leave a function that a stream calls. The results become NaN, which the caller notices.
void mix_in_stream(void* argument) {
  std::unique_ptr<Work> work(static_cast<Work*>(argument));
  const ffi::Error error = report_failure([&] {
    static thread_local Kept kept;
    mix(Threads::all(), work->in, work->outputs, work->y, kept);
  });
  if (error.success()) return;
  LastError::all().set(error.message());
  std::fill(work->y, work->y + work->in.tokens * work->outputs, NAN);
}

ffi::Error mix_on_gpu(void* stream, ffi::AnyBuffer x, Ids ids, Floats share, ffi::Result<Floats> y) {
  return report_failure([&] {
    const Cuda& cuda = Cuda::driver();
    const size_t sizes[] = {x.size_bytes(), ids.size_bytes(), share.size_bytes(), y->size_bytes()};
    const auto aligned = [](size_t size) { return (size + 255) / 256 * 256; };
    size_t total = 0;
    for (size_t size : sizes) total += aligned(size);
    auto* memory = static_cast<uint8_t*>(cuda.staging(stream, total));
    auto work = std::make_unique<Work>(Work{mixture(x, ids, share), y->dimensions()[1], nullptr});
    const void* from[] = {x.untyped_data(), ids.untyped_data(), share.untyped_data()};
    uint8_t* to[4];
    for (int i = 0; i < 4; memory += aligned(sizes[i]), ++i) to[i] = memory;
    for (int i = 0; i < 3; ++i) cuda.copy_to_host(to[i], from[i], sizes[i], stream);
    work->in.x = to[0], work->in.ids = reinterpret_cast<int32_t*>(to[1]);
    work->in.share = reinterpret_cast<float*>(to[2]), work->y = reinterpret_cast<float*>(to[3]);
    cuda.call_host(stream, mix_in_stream, work.release());
    cuda.copy_to_device(y->untyped_data(), to[3], sizes[3], stream);
  });
}

// A component of stored matrices: their values, block scales, or tensor scales.
struct Component {
  const uint8_t* data;
  size_t size;  // bytes of a matrix
};

Component component_of(const Bank& bank, int64_t which) {
  if (which == 0) return {bank.weights, size_t(bank.o * bank.row_bytes)};
  if (which == 1) return {bank.scales, size_t(bank.o * bank.scale_bytes)};
  return {reinterpret_cast<const uint8_t*>(bank.tensor_scale), sizeof(float)};
}

// Calls copy(place, from, size) for each run of matrices that lie together. Those with the id -1 are left out.
template <class Copy>
void for_runs(const int32_t* ids, int64_t count, int64_t which, const Copy& copy) {
  const Bank bank = Banks::all().find(ids, count);
  const Component part = component_of(bank, which);
  for (int64_t i = 0, end; i < count; i = end) {
    for (end = i + 1; end < count && ids[end] == ids[end - 1] + 1;) ++end;
    if (ids[i] >= 0) copy(size_t(i) * part.size, part.data + size_t(ids[i] - bank.first) * part.size, size_t(end - i) * part.size);
  }
}

ffi::Error fetch_on_cpu(int64_t which, Ids ids, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  return report_failure([&] {
    auto* to = static_cast<uint8_t*>(out->untyped_data());
    for_runs(ids.typed_data(), int64_t(ids.element_count()), which,
             [&](size_t place, const uint8_t* from, size_t size) { std::memcpy(to + place, from, size); });
  });
}

// All threads fill one buffer of pinned memory while the one before is copied to the device.
ffi::Error fetch_on_gpu(void* stream, int64_t which, Ids ids, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> out) {
  return report_failure([&] {
    const Cuda& cuda = Cuda::driver();
    std::vector<int32_t> wanted(ids.element_count());
    cuda.copy_to_host(wanted.data(), ids.typed_data(), wanted.size() * 4, stream);
    cuda.wait(stream);
    auto* to = static_cast<uint8_t*>(out->untyped_data());
    Pipe& pipe = Pipe::of(stream);
    for_runs(wanted.data(), int64_t(wanted.size()), which, [&](size_t place, const uint8_t* from, size_t size) {
      for (size_t begun = 0; begun < size; begun += Pipe::kBytes) {
        const size_t some = std::min(size - begun, Pipe::kBytes);
        uint8_t* memory = pipe.next();
        const int64_t pieces = int64_t((some + kCopied - 1) / kCopied);
        parallel(Threads::all(), pieces, [&](int64_t i, int64_t) {
          const size_t at = size_t(i) * kCopied;
          std::memcpy(memory + at, from + begun + at, std::min(kCopied, some - at));
        });
        cuda.copy_to_device(to + place + begun, memory, some, stream);
        pipe.sent();
      }
    });
  });
}

}  // namespace dsv32

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_host_mix_cpu, dsv32::mix_on_cpu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<dsv32::Ids>()
                                  .Arg<dsv32::Floats>()
                                  .Ret<dsv32::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_host_mix_gpu, dsv32::mix_on_gpu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<dsv32::Ids>()
                                  .Arg<dsv32::Floats>()
                                  .Ret<dsv32::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_host_fetch_cpu, dsv32::fetch_on_cpu,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("component")
                                  .Arg<dsv32::Ids>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_host_fetch_gpu, dsv32::fetch_on_gpu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Attr<int64_t>("component")
                                  .Arg<dsv32::Ids>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

extern "C" int32_t dsv32_host_add(int32_t format, int64_t count, int64_t o, int64_t k, int64_t row_bytes,
                                  int64_t scale_bytes, const void* weights, const void* scales,
                                  const float* tensor_scale) {
  return dsv32::Banks::all().add({format, 0, count, o, k, row_bytes, scale_bytes, static_cast<const uint8_t*>(weights),
                                  static_cast<const uint8_t*>(scales), tensor_scale});
}

extern "C" void dsv32_host_remove(int32_t first) { dsv32::Banks::all().remove(first); }

// Why results became NaN in a stream, once; empty if they did not.
extern "C" void dsv32_host_error(char* text, size_t size) {
  std::strncpy(text, dsv32::LastError::all().take().c_str(), size - 1);
}
