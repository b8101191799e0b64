// What many adapters do at once to whole rows: each scales, shifts or pools rows of its own.
#pragma once
#include <algorithm>

#include "pool.h"
#include "vec.h"

template <class T>
void affine(Pool& pool, const AffineCall& call) {
  const int64_t width = call.width, whole = width / 16 * 16;
  pool.run(call.count, [&](int64_t item) {
    auto of_layer = [&](const float* const* vectors) {
      return vectors ? vectors[item] + call.layer * width : nullptr;
    };
    const float *gain = of_layer(call.gains), *shift = of_layer(call.shifts);
    for (int64_t row = call.bounds[2 * item]; row < call.bounds[2 * item + 1]; row++) {
      T* x = static_cast<T*>(call.x) + row * call.stride;
      for (int64_t i = 0; i < whole; i += 16) {
        v16 y = load(x + i);
        if (gain) y *= load(gain + i);
        if (shift) y += load(shift + i);
        store(x + i, y);
      }
      for (int64_t i = whole; i < width; i++) {
        float y = to_float(x[i]);
        if (gain) y *= gain[i];
        if (shift) y += shift[i];
        x[i] = from_float<T>(y);
      }
    }
  });
}

template <class T>
void mean(Pool& pool, const MeanCall& call) {
  pool.run(call.count, [&](int64_t item) {
    int64_t start = call.bounds[2 * item], stop = call.bounds[2 * item + 1];
    T* out = static_cast<T*>(call.out) + item * call.width;
    for (int64_t i = 0; i < call.width; i += 16) {
      int64_t lanes = std::min<int64_t>(16, call.width - i);
      v16 total = {};
      for (int64_t row = start; row < stop; row++)
        total += load_some(static_cast<const T*>(call.x) + row * call.stride + i, lanes);
      total /= splat(static_cast<float>(stop - start));
      for (int64_t c = 0; c < lanes; c++) out[i + c] = from_float<T>(total[c]);
    }
  });
}
