// What stands between two products besides the products: rows scaled by request state, the FFN's activation.
#pragma once
#include "attention.h"
#include "rows.h"

template <class X, class T>
void scale(Pool& pool, const ScaleCall& call, int64_t rows, const PagedView& view) {
  const int64_t width = call.width, whole = width / 16 * 16;
  each_row(pool, rows, [&](int64_t row) {
    const T* vectors = static_cast<const T*>(view.vectors[call.site * rows + row]);
    if (!vectors) return;
    const T* by = vectors + call.layer * width;
    X* x = static_cast<X*>(call.x) + row * call.stride;
    for (int64_t i = 0; i < whole; i += 16) store(x + i, load(x + i) * (load(by + i) + splat(1)));
    for (int64_t i = whole; i < width; i++) x[i] = from_float<X>(to_float(x[i]) * (to_float(by[i]) + 1));
  });
}

template <class T>
void scale(Pool& pool, const ScaleCall& call, int64_t rows, const PagedView& view) {
  if (call.wide) scale<float, T>(pool, call, rows, view);
  else scale<T, T>(pool, call, rows, view);
}

template <class X, class T, Activation kAct>
void activate_rows(Pool& pool, const ActivateCall& call, int64_t rows) {
  const int64_t width = call.width;
  each_row(pool, rows, [&](int64_t row) {
    const X* gate = static_cast<const X*>(call.x) + row * width * (call.gated ? 2 : 1);
    const X* up = gate + width;
    T* out = static_cast<T*>(call.out) + row * width;
    for (int64_t i = 0; i < width; i += 16) {
      int64_t lanes = std::min<int64_t>(16, width - i);
      v16 y = activate<kAct>(load_some(gate + i, lanes));
      if (call.gated) y *= load_some(up + i, lanes);
      if (lanes == 16) store(out + i, y);
      else
        for (int64_t c = 0; c < lanes; c++) out[i + c] = from_float<T>(y[c]);
    }
  });
}

template <class X, class T>
void activate_rows(Pool& pool, const ActivateCall& call, int64_t rows) {
  switch (call.act) {
    case Activation::none:
      return activate_rows<X, T, Activation::none>(pool, call, rows);
    case Activation::silu:
      return activate_rows<X, T, Activation::silu>(pool, call, rows);
    case Activation::gelu_tanh:
      return activate_rows<X, T, Activation::gelu_tanh>(pool, call, rows);
    case Activation::relu:
      return activate_rows<X, T, Activation::relu>(pool, call, rows);
  }
}

template <class T>
void activate_rows(Pool& pool, const ActivateCall& call, int64_t rows) {
  if (call.wide) activate_rows<float, T>(pool, call, rows);
  else activate_rows<T, T>(pool, call, rows);
}
