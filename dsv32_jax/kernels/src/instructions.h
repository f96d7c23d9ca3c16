// The instruction sets that there are kernels for, and the one to take on this processor.
#pragma once

namespace dsv32 {

enum Instructions { kPortable, kAvx2, kAvx512Bf16 };

inline Instructions instructions() {
#if defined(__x86_64__) && !defined(DSV32_PORTABLE)
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512Bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kPortable;
}

}  // namespace dsv32
