// y = x W^T over packed weights. One panel holds 16 output columns:
//   float     [in][16]
//   bfloat16  [in / 32][16 pairs][16 columns][2]: 1 KiB tiles that AMX loads as they are
//   int8      [in / 64][16 quads][16 columns][4], with zeros behind the inputs: the same; one scale per column
// Rows in bfloat16 are turned and rounded for int8 weights (bytes.h), and rounded for weights in blocks (blocks.h).
// Small batches read each panel once from memory, which is all that counts there; large ones are blocked.
#pragma once
#include <algorithm>
#include <optional>
#include <type_traits>

#include "blocks.h"
#include "bytes.h"
#include "pool.h"
#include "products.h"
#include "vec.h"

constexpr int kDepth = 32, kRows = 64;

inline int64_t panels_of(const Linear& w) {
  return w.paired ? (w.out_features / 2 + kColumns - 1) / kColumns * 2 : (w.out_features + kColumns - 1) / kColumns;
}

// The panels of a layer's weights.
template <class W>
struct Panels {
  const W* first;
  int64_t depth, count;  // inputs with what is beside them; panels

  Panels(const Linear& w, int64_t depth) : first(static_cast<const W*>(w.panels)), depth(depth), count(panels_of(w)) {}
  int64_t size() const { return depth * kColumns; }
  const W* operator[](int64_t panel) const { return first + panel * size(); }
};

// ---- what becomes of the products

template <class T>
struct Sink {
  const Linear& w;
  Out mode;
  Activation act;
  void* out;
  int64_t stride;
  ByteRows rounded;  // where sums are int32_t

  // Asks for the memory that `take` is going to write for a panel: a line in each row.
  void expect(int64_t panel, int64_t first_row, int rows) const {
    const int64_t size = mode == Out::add || mode == Out::wide ? sizeof(float) : sizeof(T);
    const char* to = static_cast<const char*>(out) + (first_row * stride + first_column(panel)) * size;
    for (int r = 0; r < rows; r++, to += stride * size) __builtin_prefetch(to, 1);
  }

  // c[rows][16] of `panel`, and the next panel's, if given; gated mode needs them.
  template <class C>
  void take(int64_t panel, int64_t first_row, int rows, const C* c, const C* next) const {
    if (mode == Out::add) return write<Out::add, Activation::none>(panel, first_row, rows, c, next);
    if (mode == Out::wide) return write<Out::wide, Activation::none>(panel, first_row, rows, c, next);
    if (mode == Out::gated && act == Activation::silu)
      return write<Out::gated, Activation::silu>(panel, first_row, rows, c, next);
    if (mode == Out::gated && act == Activation::relu)
      return write<Out::gated, Activation::relu>(panel, first_row, rows, c, next);
    if (mode == Out::gated) return write<Out::gated, Activation::gelu_tanh>(panel, first_row, rows, c, next);
    if (act == Activation::none) return write<Out::store, Activation::none>(panel, first_row, rows, c, next);
    if (act == Activation::silu) return write<Out::store, Activation::silu>(panel, first_row, rows, c, next);
    if (act == Activation::relu) return write<Out::store, Activation::relu>(panel, first_row, rows, c, next);
    return write<Out::store, Activation::gelu_tanh>(panel, first_row, rows, c, next);
  }

 private:
  // Where a panel's columns go, what they are multiplied with and added to.
  struct Columns {
    int64_t first;
    int valid;
    v16 scale, bias;
    i16x offsets;
  };

  int64_t within(int64_t panel) const { return (w.paired ? panel / 2 : panel) * kColumns; }
  int64_t limit() const { return w.paired ? w.out_features / 2 : w.out_features; }
  int64_t first_column(int64_t panel) const {  // the second half of the result is behind the first
    return within(panel) + (w.paired && mode != Out::gated && panel % 2 ? limit() : 0);
  }

  Columns columns_of(int64_t panel) const {
    const int64_t first = first_column(panel);
    const int valid = static_cast<int>(std::min<int64_t>(kColumns, limit() - within(panel)));
    return {first, valid, w.scales ? load(w.scales + panel * kColumns) : splat(1),
            w.bias ? load(w.bias + panel * kColumns) : splat(0),
            w.offsets ? load(w.offsets + panel * kColumns) : i16x{}};
  }

  v16 finished(const float* c, const Columns& of, int64_t) const { return load(c) + of.bias; }
  v16 finished(const int32_t* c, const Columns& of, int64_t row) const {
    const i16x sum = has_dots<uint8_t>() ? load(c) - of.offsets : load(c);
    return fused(to_floats(sum), rounded.scales[row] * of.scale, of.bias);
  }

  template <Out kMode>
  using Result = std::conditional_t<kMode == Out::add || kMode == Out::wide, float, T>;

  template <Out kMode>
  static void put(Result<kMode>* x, v16 y, int valid) {
    if (kMode == Out::add && valid == kColumns) y += load(x);
    if (valid == kColumns) {
      store(x, y);
    } else {
      for (int i = 0; i < valid; i++) x[i] = from_float<Result<kMode>>(kMode == Out::add ? to_float(x[i]) + y[i] : y[i]);
    }
  }

  template <Out kMode, Activation kAct, class C>
  void write(int64_t panel, int64_t first_row, int rows, const C* c, const C* next) const {
    Columns left = columns_of(panel), right = next ? columns_of(panel + 1) : left;
    auto* x = static_cast<Result<kMode>*>(out) + first_row * stride;
    for (int r = 0; r < rows; r++, x += stride) {
      v16 y = activate<kAct>(finished(c + r * kColumns, left, first_row + r));
      if (kMode == Out::gated) y *= finished(next + r * kColumns, right, first_row + r);
      put<kMode>(x + left.first, y, left.valid);
      if (kMode != Out::gated && next)  // the same line of memory, while it is at hand
        put<kMode>(x + right.first, activate<kAct>(finished(next + r * kColumns, right, first_row + r)), right.valid);
    }
  }
};

#ifdef __AVX512VNNI__
// Items of 4 panels (for few rows of more, in order, so that the memory can be asked ahead), those that do not come
// out even for all threads halved. Panels outside, rows inside: a block's rows and 4 panels stay in the L2 cache.
template <class X, class W, class T>
void linear_by_dots(Pool& pool, const Panels<W>& w, const X* x, int64_t rows, int64_t stride, const Sink<T>& sink,
                    int64_t block) {
  const int64_t threads = pool.threads(), blocks = (rows + block - 1) / block, width = w.count;
  const int group = dots::panels_at_once(rows);
  const int64_t step = rows <= dots::most_rows(group) ? std::max<int64_t>(4, width / (4 * threads) / 4 * 4) : 4;
  const int64_t whole = width / (step * threads) * threads, halves = (width - whole * step + 1) / 2;
  pool.run(blocks * (whole + halves), [&](int64_t item) {
    const int64_t row = item / (whole + halves) * block, end = std::min(rows, row + block);
    const int64_t at = item % (whole + halves);
    const int64_t first = at < whole ? at * step : whole * step + (at - whole) * 2;
    const int64_t last = std::min(width, first + (at < whole ? step : 2));
    alignas(64) SumOf<X> c[dots::kPanels * kRows * kColumns];
    for (int64_t p = first; p < last; p += group) {
      const int count = static_cast<int>(std::min<int64_t>(group, last - p));
      const int64_t later = p + group < last ? p + group : p + step * threads;
      const W* next = rows <= kRows && later + count <= width ? w[later] : nullptr;
      for (int64_t r = row; r < end; r += kRows) {
        const int n = static_cast<int>(std::min<int64_t>(kRows, end - r));
        dots::multiply(count, n, x + r * stride, stride, w[p], w.size(), w.depth, false, c, kRows * kColumns, kColumns,
                       next);
        for (int i = 0; i < count; i += 2)
          sink.take(p + i, r, n, c + i * kRows * kColumns, i + 1 < count ? c + (i + 1) * kRows * kColumns : nullptr);
      }
    }
  });
}
#endif

#ifdef PRAD_AMX
// Rows from `row` on, in whole 32s, by the panels [first, last), `elsewhere` those behind them; returns where they end.
template <class X, class W, class T>
int64_t linear_by_squares(const Panels<W>& w, const X* x, int64_t row, int64_t end, int64_t stride, bool few,
                          int64_t first, int64_t last, int64_t elsewhere, const Sink<T>& sink) {
  alignas(64) SumOf<X> c[kRows * kColumns];
  amx::configure_tiles(0, 0);
  const int64_t full = row + (end - row) / 32 * 32;
  auto square = [&](int64_t r, int64_t p, const W* ahead) {
    amx::multiply_square(x + r * stride, stride, w[p], w.size() * static_cast<int64_t>(sizeof(W)), w.depth, ahead, c);
    sink.take(p, r, 32, c, c + 512);
  };
  if (few) {  // the weights come from memory: each once, the next two panels meanwhile
    auto soon = [&](int64_t p) { return w[p < last ? p : p - last + elsewhere]; };
    for (int64_t p = first; p + 1 < last; p += 2)
      for (int64_t r = row; r < full; r += 32) square(r, p, soon(p + (r == row ? 2 : 3)));
  } else {
    for (int64_t r = row; r < full; r += 32)
      for (int64_t p = first; p + 1 < last; p += 2) square(r, p, nullptr);
  }
  end_rows<X>();
  if ((last - first) % 2) {  // a panel without a neighbour
    for (int64_t r = row; r < full; r += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, full - r));
      begin_rows<X>(count);
      multiply(x + r * stride, stride, count, w[last - 1], w.depth, c);  // read as they are
      end_rows<X>();
      sink.take(last - 1, r, count, c, static_cast<const SumOf<X>*>(nullptr));
    }
  }
  return full;
}
#endif

template <class X, class W, class T>
void linear(Pool& pool, const Panels<W>& w, const X* x, int64_t rows, int64_t stride, const Sink<T>& sink) {
  const int64_t block = rows <= kRows ? kRows : 256, blocks = (rows + block - 1) / block;
#ifdef __AVX512VNNI__
  if constexpr (has_dots<X>())
    if (!in_tiles<X>()) return linear_by_dots(pool, w, x, rows, stride, sink, block);
#endif
  auto each_alone = [](int64_t count, const auto& body) {
    for (int64_t row = 0; row < count; row++) body(row);
  };
  auto each_together = [&](int64_t count, const auto& body) { each_row(pool, count, body); };
  auto read_rows = [&](const X* from, int64_t count, const auto& each) {
    return ReadRows<X>(from, stride, count, w.depth, each);
  };
  std::optional<ReadRows<X>> few;  // once for all items
  if (rows <= kRows) few = read_rows(x, rows, each_together);
  const int64_t step = panels_of_item(w.count, blocks, pool.threads());
  const int64_t columns = (w.count + step - 1) / step;
  pool.run(blocks * columns, [&](int64_t item) {
    int64_t row = item / columns * block, end = std::min(rows, row + block);
    const int64_t first = item % columns * step, last = std::min(w.count, first + step);
    alignas(64) SumOf<X> c[2 * kRows * kColumns];
    SumOf<X>* const next = c + kRows * kColumns;
    const int64_t elsewhere = first + step * pool.threads();  // where this thread is likely to go on
#ifdef PRAD_AMX
    if constexpr (sizeof(X) < 4)
      if (rows >= 32 && allow_amx())
        row = linear_by_squares(w, x, row, end, stride, rows <= kRows, first, last, elsewhere, sink);
#endif
    for (; row < end; row += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, end - row));
      const ReadRows<X> read = few ? few->from(row) : read_rows(x + row * stride, count, each_alone);
      const int64_t then = row + count < end ? first : elsewhere;
      auto later = [&](int64_t p) { return p + 1 < last ? w[p + 1] : then < w.count ? w[then] : nullptr; };
      auto one = [&](int64_t p, SumOf<X>* to) {
        sink.expect(p, row, count);
        multiply(read.x, read.stride, count, w[p], w.depth, to, kColumns, later(p));
      };
      begin_rows<X>(count);
      for (int64_t p = first; p < last; p += 2) {
        const bool both = p + 1 < last;
        one(p, c);
        if (both) one(p + 1, next);
        sink.take(p, row, count, c, both ? next : nullptr);
      }
      end_rows<X>();
    }
  });
}

template <class T>
void linear(Pool& pool, const LinearCall& call, int64_t rows) {
  const Linear& w = *call.weights;
  const T* x = static_cast<const T*>(call.x);
  Sink<T> sink{w, call.mode, call.act, call.out, call.out_stride, {}};
  if constexpr (sizeof(T) == 2) {
    const Weights kind = w.weights;
    if (kind >= Weights::fours)
      return blocks::linear(pool, w, panels_of(w), blocks::round_rows(pool, x, call.x_stride, rows, w.in_features), rows,
                            sink);
    if (kind == Weights::int8) {
      const int64_t depth = (w.in_features + kTurned - 1) / kTurned * kTurned;
      sink.rounded = round_rows(pool, x, call.x_stride, rows, w.in_features, depth);
      return linear(pool, Panels<int8_t>(w, depth), sink.rounded.x, rows, depth, sink);
    }
  }
  linear(pool, Panels<T>(w, w.in_features), x, rows, call.x_stride, sink);
}
