// Which kernel computes a format: that of the widest instructions that the processor has.
#pragma once

#include "call.h"
#include "instructions.h"
#include "portable.h"
#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#endif

namespace dsv32 {

enum Format { kNvfp4, kFp8, kBf16, kBf16Columns };

inline const Kernel& choose(Format format, [[maybe_unused]] bool x_is_bf16) {
#if defined(__x86_64__) && !defined(DSV32_PORTABLE)
  static constexpr Kernel wide[] = {avx512::kernel<avx512::Nvfp4>(), avx512::kernel<avx512::Fp8>(),
                                    avx512::kernel<avx512::Bf16>(), avx512::column_kernel()};
  static constexpr Kernel usual[] = {avx2::kernel<avx2::Nvfp4>(), avx2::kernel<avx2::Fp8>(),
                                     avx2::kernel<avx2::Bf16>(), avx2::column_kernel()};
  if (instructions() == kAvx512Bf16 && x_is_bf16) return wide[format];
  if (instructions() != kPortable) return usual[format];
#endif
  static constexpr Kernel plain[] = {portable::kernel<portable::Nvfp4>(), portable::kernel<portable::Fp8>(),
                                     portable::kernel<portable::Bf16>(), portable::column_kernel()};
  return plain[format];
}

}  // namespace dsv32
