// The weights of the next part, brought into the second-level cache while a part is computed: a little at each chunk, so
// that memory is never idle and never waited for. Hardware alone does not look that far, and stops at pages.
#pragma once

#include "call.h"

namespace dsv32 {

class Ahead {
 public:
  // Where no part is next, nothing new is brought. A fetch outside of the array does nothing.
  Ahead(const Call& call, Part next, int64_t code_step, int64_t scale_step) {
    if (next.group == nullptr) return;
    const int64_t row = next.group->matrix * call.o + next.first;
    codes_ = call.weights + row * call.row_bytes, scales_ = call.scales + row * call.scale_bytes;
    code_step_ = code_step, scale_step_ = scale_step;
  }

  template <int kBytes>
  void bring() {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(codes_ + line, 0, 2);
    if (scale_step_ > 0) __builtin_prefetch(scales_, 0, 2);
    codes_ += code_step_, scales_ += scale_step_;
  }

  // Called when all of the part has been brought: other rows of x go over the same weights.
  void stop() { code_step_ = scale_step_ = 0; }

 private:
  const uint8_t *codes_ = nullptr, *scales_ = nullptr;
  int64_t code_step_ = 0, scale_step_ = 0;
};

}  // namespace dsv32
