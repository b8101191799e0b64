// value += f(source down + bias) up, f: x or ReLU, each span of rows with matrices of its own: many adapters at once.
// A row's numbers stay float32 until they are added; nothing is gathered, joined or padded. Beside bfloat16 matrices
// value and source may be float.
#pragma once
#include <algorithm>
#include <vector>

#include "dots.h"
#include "plain.h"
#include "pool.h"
#include "vec.h"

template <class V, class S, class T>
struct LowRank {
  static constexpr int kTogether = plain::kMost;  // rows that share what is loaded of an adapter

  const LowRankCall& call;
  const LowRankSpan& span;
  const T *down, *up;
  const float* bias;

  LowRank(const LowRankCall& call, const LowRankSpan& span)
      : call(call),
        span(span),
        down(static_cast<const T*>(span.down) + call.layer * call.width_in * span.r),
        up(static_cast<const T*>(span.up) + call.layer * span.r * call.width_out),
        bias(span.bias ? span.bias + call.layer * span.r : nullptr) {}

  void run() const {
    thread_local std::vector<float> memory;
    const int64_t rows = span.stop - span.start, together = round_to(rows, kTogether);
    const bool by_dots = kDots && call.width_in % 32 == 0;
    memory.resize(together * span.r + (by_dots ? 0 : kTogether * call.width_in));
    float *hidden = memory.data(), *x = hidden + together * span.r;  // [rows / 8][r][8], and [in][8] of one group
#ifdef __AVX512BF16__
    if constexpr (kDots)
      if (by_dots) narrow_by_dots(rows, hidden);
#endif
    for (int64_t row = 0; row < rows; row += kTogether, hidden += kTogether * span.r) {
      int count = static_cast<int>(std::min<int64_t>(kTogether, rows - row));
      if (!by_dots) {
        for (int i = 0; i < kTogether; i++) {  // rows too many repeat the last one; they are not written
          const S* from = source(row + std::min(i, count - 1));
          for (int64_t k = 0; k < call.width_in; k++) x[k * kTogether + i] = to_float(from[k]);
        }
        for (int64_t column = 0; column < span.r; column += 16) narrow(x, column, hidden);
      }
      for (int64_t column = 0; column < call.width_out; column += 16) widen(hidden, column, span.start + row, count);
    }
  }

 private:
#ifdef __AVX512BF16__
  static constexpr bool kDots = sizeof(S) == 2 && sizeof(T) == 2;
#else
  static constexpr bool kDots = false;
#endif

  static int64_t round_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  const S* source(int64_t row) const {
    return static_cast<const S*>(call.source) + (span.start + row) * call.source_stride;
  }

  // acc[row] = sum over i of x[i][row] * w[i][columns], for up to 16 columns of w [count, width]
  static void multiply(const float* x, const T* w, int64_t count, int64_t width, int64_t lanes, v16* acc) {
    v16 sums[kTogether] = {};
    for (int64_t i = 0; i < count; i++, x += kTogether, w += width) {
      v16 columns = lanes >= 16 ? load(w) : load_some(w, lanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTogether; row++) sums[row] = fused(splat(x[row]), columns, sums[row]);
    }
    for (int row = 0; row < kTogether; row++) acc[row] = sums[row];
  }

  void narrow(const float* x, int64_t column, float* hidden) const {
    int64_t lanes = std::min<int64_t>(16, span.r - column);
    v16 acc[kTogether];
    multiply(x, down + column, call.width_in, span.r, lanes, acc);
    for (int row = 0; row < kTogether; row++) {
      v16 h = activated(acc[row], column, lanes);
      for (int64_t i = 0; i < lanes; i++) hidden[(column + i) * kTogether + row] = h[i];
    }
  }

  v16 activated(v16 sum, int64_t column, int64_t lanes) const {
    v16 h = sum + (bias ? load_some(bias + column, lanes) : splat(0));
    return (call.relu ? activate<Activation::relu>(h) : h) * span.factor;
  }

#ifdef __AVX512BF16__
  // hidden of all rows: `down` is packed as weights are (linear.h), four panels at a time, and then multiplied.
  void narrow_by_dots(int64_t rows, float* hidden) const {
    thread_local std::vector<bf16> packed;
    thread_local std::vector<float> sums;
    const int64_t size = call.width_in * 16;
    packed.resize(dots::kPanels * size);
    sums.resize(dots::kPanels * rows * 16);
    for (int64_t first = 0; first < span.r; first += dots::kPanels * 16) {
      const int panels = static_cast<int>(std::min<int64_t>(dots::kPanels, (span.r - first + 15) / 16));
      for (int p = 0; p < panels; p++) pack(first + p * 16, packed.data() + p * size);
      dots::multiply(panels, rows, source(0), call.source_stride, packed.data(), size, call.width_in, false, sums.data(),
                     rows * 16, 16);
      for (int p = 0; p < panels; p++) {
        const int64_t column = first + p * 16, lanes = std::min<int64_t>(16, span.r - column);
        for (int64_t row = 0; row < rows; row++) {
          v16 h = activated(load(sums.data() + (p * rows + row) * 16), column, lanes);
          float* to = hidden + (row / kTogether * span.r + column) * kTogether + row % kTogether;
          for (int64_t i = 0; i < lanes; i++) to[i * kTogether] = h[i];
        }
      }
    }
  }

  // 16 columns of `down` from `column` on: two inputs side by side, zeros where there are fewer columns.
  void pack(int64_t column, bf16* to) const {
    const __mmask16 some = static_cast<__mmask16>((1u << std::min<int64_t>(16, span.r - column)) - 1);
    const T* from = down + column;
    for (int64_t k = 0; k < call.width_in; k += 2, from += 2 * span.r, to += 32) {
      __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
      __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + span.r));
      _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
#endif

  void widen(const float* hidden, int64_t column, int64_t first, int rows) const {
    int64_t lanes = std::min<int64_t>(16, call.width_out - column);
    v16 acc[kTogether];
    multiply(hidden, up + column, span.r, call.width_out, lanes, acc);
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
