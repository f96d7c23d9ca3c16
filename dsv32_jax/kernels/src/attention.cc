// Sparse attention and its top-k on XLA's CPU backend (its foreign function interface).
#include "attend.h"
#include "instructions.h"
#include "parallel.h"
#include "portable.h"
#include "select.h"
#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#endif
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dsv32 {

Attend choose(Instructions instructions, [[maybe_unused]] bool q_is_bf16) {
#if defined(__x86_64__)
  if (instructions == kAvx512Bf16 && q_is_bf16) return avx512::attend;
  if (instructions != kPortable) return avx2::attend;
#endif
  return portable::attend;
}

Vectors vectors(const ffi::AnyBuffer& values, const float* scales) {
  const Storage storage = values.element_type() == ffi::F32   ? Storage::kFloat32
                          : values.element_type() == ffi::U16 ? Storage::kBf16
                                                              : Storage::kFp8;
  return {values.untyped_data(), scales, storage, values.dimensions().back()};
}

// q_c [B, T, H, C], q_r [B, T, H, R], pools [..., C] and [..., R], slot [B, T, k] -> out [B, T, H, C]. Only latents in
// FP8 have scales, [..., C / 128].
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q_c, ffi::AnyBuffer q_r, ffi::AnyBuffer latent,
                     ffi::Buffer<ffi::F32> scales, ffi::AnyBuffer rotated, ffi::Buffer<ffi::S32> slot, float scale,
                     ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto shape = q_c.dimensions();
  Attention call{};
  call.queries = shape[0] * shape[1], call.heads = shape[2], call.count = slot.dimensions()[2];
  call.q_c = q_c.untyped_data(), call.q_r = q_r.untyped_data();
  call.q_is_bf16 = q_c.element_type() == ffi::BF16;
  call.latent = vectors(latent, scales.typed_data()), call.rotated = vectors(rotated, nullptr);
  call.slot = slot.typed_data(), call.scale = scale, call.out = out->typed_data();
  run_attention(pool, choose(instructions(), call.q_is_bf16), call);
  return ffi::Error::Success();
}

// score [B, T, S], position [B, T] -> selected [B, T, k].
ffi::Error select_topk(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> score, ffi::Buffer<ffi::S32> position,
                       ffi::Result<ffi::Buffer<ffi::S32>> selected) {
  run_select(pool, score.typed_data(), score.dimensions()[2], position.typed_data(), int64_t(position.element_count()),
             selected->dimensions()[2], selected->typed_data());
  return ffi::Error::Success();
}

}  // namespace dsv32

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_select, dsv32::select_topk,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv32_attention, dsv32::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>());
