// value += f(source down + bias) up, f: x or ReLU, each span of rows with matrices of its own: many adapters at once.
// A row's numbers stay float32 until they are added; nothing is gathered, joined or padded. Beside bfloat16 matrices
// value and source may be float.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

struct LowRankSpan {
  int64_t start, stop;  // rows
  const void* down;   // [layers, in, r]
  const float* bias;  // [layers, r] or null
  const void* up;     // [layers, r, out]
  int64_t r;
  float factor;
};

struct LowRankCall {
  void* value;         // [rows, out]
  const void* source;  // [rows, in]; may be value
  const LowRankSpan* spans;
  int64_t count, value_stride, source_stride, in, out, layer;
  int32_t relu, wide_value, wide_source;  // wide: float
};

template <class V, class S, class T>
struct LowRank {
  static constexpr int kTogether = 8;  // rows that share what is loaded of an adapter

  const LowRankCall& call;
  const LowRankSpan& span;
  const T *down, *up;
  const float* bias;

  LowRank(const LowRankCall& call, const LowRankSpan& span)
      : call(call),
        span(span),
        down(static_cast<const T*>(span.down) + call.layer * call.in * span.r),
        up(static_cast<const T*>(span.up) + call.layer * span.r * call.out),
        bias(span.bias ? span.bias + call.layer * span.r : nullptr) {}

  void run() const {
    thread_local std::vector<float> memory;
    int64_t width = (span.r + 15) / 16 * 16;
    memory.resize(kTogether * (call.in + width));
    float *x = memory.data(), *hidden = x + kTogether * call.in;  // [in][rows] and [r][rows]
    for (int64_t first = span.start; first < span.stop; first += kTogether) {
      int rows = static_cast<int>(std::min<int64_t>(kTogether, span.stop - first));
      for (int i = 0; i < kTogether; i++) {  // rows too many repeat the last one; they are not written
        const S* from = static_cast<const S*>(call.source) + (first + std::min(i, rows - 1)) * call.source_stride;
        for (int64_t k = 0; k < call.in; k++) x[k * kTogether + i] = to_float(from[k]);
      }
      for (int64_t column = 0; column < span.r; column += 16) narrow(x, column, hidden);
      for (int64_t column = 0; column < call.out; column += 16) widen(hidden, column, first, rows);
    }
  }

 private:
  // acc[row] = sum over i of x[i][row] * w[i][columns], for up to 16 columns of w [count, width]
  static void multiply(const float* x, const T* w, int64_t count, int64_t width, int64_t lanes, v16* acc) {
    v16 sums[kTogether] = {};
    for (int64_t i = 0; i < count; i++, x += kTogether, w += width) {
      v16 columns = lanes >= 16 ? load(w) : load_some(w, lanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTogether; row++) sums[row] += x[row] * columns;
    }
    for (int row = 0; row < kTogether; row++) acc[row] = sums[row];
  }

  void narrow(const float* x, int64_t column, float* hidden) const {
    int64_t lanes = std::min<int64_t>(16, span.r - column);
    v16 acc[kTogether];
    multiply(x, down + column, call.in, span.r, lanes, acc);
    v16 shift = bias ? load_some(bias + column, lanes) : splat(0);
    for (int row = 0; row < kTogether; row++) {
      v16 h = acc[row] + shift;
      if (call.relu) h = activate<Activation::relu>(h);
      h *= span.factor;
      for (int64_t i = 0; i < lanes; i++) hidden[(column + i) * kTogether + row] = h[i];
    }
  }

  void widen(const float* hidden, int64_t column, int64_t first, int rows) const {
    int64_t lanes = std::min<int64_t>(16, call.out - column);
    v16 acc[kTogether];
    multiply(hidden, up + column, span.r, call.out, lanes, acc);
    V* to = static_cast<V*>(call.value) + first * call.value_stride + column;
    for (int row = 0; row < rows; row++, to += call.value_stride) {
      if (lanes == 16) store(to, load(to) + acc[row]);
      else
        for (int64_t c = 0; c < lanes; c++) to[c] = from_float<V>(to_float(to[c]) + acc[row][c]);
    }
  }
};

template <class V, class S, class T>
void low_rank(Pool& pool, const LowRankCall& call) {
  pool.run(call.count, [&](int64_t item) { LowRank<V, S, T>(call, call.spans[item]).run(); });
}

template <class T>
void low_rank(Pool& pool, const LowRankCall& call) {
  if (call.wide_source) return low_rank<float, float, T>(pool, call);
  if (call.wide_value) return low_rank<float, T, T>(pool, call);
  low_rank<T, T, T>(pool, call);
}
