// The weights of the next part, brought into the second-level cache while a part is computed: a little at each chunk, so
// that memory is never idle and never waited for. Hardware alone does not look that far, and stops at pages.
#pragma once

#include "call.h"

namespace dsv32 {

class Ahead {
 public:
  // Of a part that is empty, or whose block has no matrix, there is nothing to bring.
  Ahead(const Call& call, Part part, int64_t scale_size) {
    const int64_t matrix = part.first < part.last ? call.expert[part.block] : -1;
    if (matrix < 0 || matrix >= call.experts) return;
    const int64_t row = matrix * call.o + part.first, count = part.last - part.first;
    weights_ = {call.weights + row * call.row_bytes, count * call.row_bytes};
    scales_ = {call.scales + row * call.row_scales * scale_size, count * call.row_scales * scale_size};
  }

  void bring(int64_t weight_bytes, int64_t scale_bytes) {
    weights_.bring(weight_bytes);
    scales_.bring(scale_bytes);
  }

 private:
  struct Rest {
    const uint8_t* at = nullptr;
    int64_t left = 0;

    void bring(int64_t bytes) {
      if (left <= 0) return;
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
      at += bytes, left -= bytes;
    }
  };
  Rest weights_, scales_;
};

}  // namespace dsv32
