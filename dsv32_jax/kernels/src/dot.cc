// Matrix products with weights as they are stored, on XLA's CPU backend (its foreign function interface).
#include "call.h"
#include "choose.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dsv32 {

// x [n, b, k], expert [n], weights [E, o, ...] (columns: [E, k, o]), scales [E, o, ...] -> y [n, b, o].
ffi::Error dot(Format format, ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32>& expert,
               ffi::AnyBuffer weights, const ffi::AnyBuffer* scales, ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const auto in = x.dimensions(), stored = weights.dimensions();
  Call call{};
  call.n = in[0], call.b = in[1], call.k = in[2];
  call.experts = stored[0], call.o = y->dimensions()[2];
  call.x = x.untyped_data();
  call.x_is_bf16 = x.element_type() == ffi::BF16;
  call.expert = expert.typed_data();
  call.weights = static_cast<const uint8_t*>(weights.untyped_data());
  call.row_bytes = stored[2] * (format == kBf16 ? 2 : 1);
  if (scales != nullptr) {
    call.scale_bytes = scales->dimensions()[2] * (format == kFp8 ? 4 : 1);
    call.scales = static_cast<const uint8_t*>(scales->untyped_data());
  }
  call.y = y->typed_data();
  run(pool, choose(format, call.x_is_bf16), call);
  return ffi::Error::Success();
}

}  // namespace dsv32

#define DSV32_SCALED(symbol, format)                                                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                        \
      symbol,                                                                                           \
      +[](ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> expert, ffi::AnyBuffer weights, \
          ffi::AnyBuffer scales, ffi::Result<ffi::Buffer<ffi::F32>> y) {                                \
        return dsv32::dot(format, pool, x, expert, weights, &scales, y);                                \
      },                                                                                                \
      ffi::Ffi::Bind()                                                                                  \
          .Ctx<ffi::ThreadPool>()                                                                       \
          .Arg<ffi::AnyBuffer>()                                                                        \
          .Arg<ffi::Buffer<ffi::S32>>()                                                                 \
          .Arg<ffi::AnyBuffer>()                                                                        \
          .Arg<ffi::AnyBuffer>()                                                                        \
          .Ret<ffi::Buffer<ffi::F32>>())

#define DSV32_PLAIN(symbol, format)                                                                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                        \
      symbol,                                                                                           \
      +[](ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> expert, ffi::AnyBuffer weights, \
          ffi::Result<ffi::Buffer<ffi::F32>> y) {                                                       \
        return dsv32::dot(format, pool, x, expert, weights, nullptr, y);                                \
      },                                                                                                \
      ffi::Ffi::Bind()                                                                                  \
          .Ctx<ffi::ThreadPool>()                                                                       \
          .Arg<ffi::AnyBuffer>()                                                                        \
          .Arg<ffi::Buffer<ffi::S32>>()                                                                 \
          .Arg<ffi::AnyBuffer>()                                                                        \
          .Ret<ffi::Buffer<ffi::F32>>())

DSV32_SCALED(dsv32_nvfp4_dot, dsv32::kNvfp4);
DSV32_SCALED(dsv32_fp8_dot, dsv32::kFp8);
DSV32_PLAIN(dsv32_bf16_dot, dsv32::kBf16);
DSV32_PLAIN(dsv32_bf16_columns, dsv32::kBf16Columns);

extern "C" const char* dsv32_instructions() {
  static const char* names[] = {"no vector instructions", "AVX2", "AVX-512 BF16"};
  return names[dsv32::instructions()];
}
