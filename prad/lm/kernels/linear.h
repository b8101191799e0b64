// y = x W^T over packed weights. One panel holds 16 output columns:
//   float     [in][16]
//   bfloat16  [in / 32][16 pairs][16 columns][2]: 1 KiB tiles that AMX loads as they are
//   int8      the same order, 512 bytes a tile, and one scale per column
// Small batches read each panel once from memory, which is all that counts there; large ones are blocked.
#pragma once
#include <algorithm>
#include <type_traits>

#include "dots.h"
#include "pool.h"
#include "vec.h"
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum class Weights : int32_t { f32 = 0, bf16 = 1, int8 = 2 };
enum class Out : int32_t {
  store = 0,  // out[row][column] = act(y), in the activations' type
  add = 1,    // out[row][column] += y, float
  gated = 2,  // panels alternate between gate and up: out[row][column] = act(gate) * up
  wide = 3,   // out[row][column] = y, float whatever the activations are
};

struct Linear {
  const void* panels;
  const float* scales;  // int8 only
  const float* bias;    // or null; in the order of the panels' columns
  int64_t in, out;      // out: valid columns
  int32_t weights, paired;
};

struct LinearCall {
  const Linear* weights;
  const void* x;  // [rows, in]
  void* out;
  int64_t x_stride, out_stride;
  int32_t mode, act;
};

constexpr int kColumns = 16, kDepth = 32, kRows = 64;
constexpr int kAhead = 8;  // tiles

inline int64_t panel_elements(const Linear& w) { return w.in * kColumns; }

// ---- up to 64 rows by one panel into c[rows][16], or added to it; `width` from row to row of c

template <bool kAdd = false>
void multiply_plain(const float* x, int64_t stride, int rows, const float* panel, int64_t in, float* c,
                    int64_t width = kColumns) {
  for (int first = 0; first < rows; first += 8) {
    int count = std::min(8, rows - first);
    v16 acc[8] = {};
    for (int r = 0; kAdd && r < count; r++) acc[r] = load(c + (first + r) * width);
    for (int64_t k = 0; k < in; k++) {
      v16 w = load(panel + k * kColumns);
      for (int r = 0; r < count; r++) acc[r] += x[(first + r) * stride + k] * w;
    }
    for (int r = 0; r < count; r++) store(c + (first + r) * width, acc[r]);
  }
}

inline void pair(const bf16* at, v16& even, v16& odd) {
  u16x both = *reinterpret_cast<const u16x*>(at);
  u16x low = both << 16, high = both & 0xffff0000u;
  even = (v16)low;
  odd = (v16)high;
}
inline void pair(const int8_t* at, v16& even, v16& odd) {
  i16x both = __builtin_convertvector(*reinterpret_cast<const h16x*>(at), i16x);
  even = __builtin_convertvector((both << 24) >> 24, v16);
  odd = __builtin_convertvector((both << 16) >> 24, v16);
}

template <bool kAdd = false, class W>
void multiply_plain(const bf16* x, int64_t stride, int rows, const W* panel, int64_t in, float* c,
                    int64_t width = kColumns) {
  for (int first = 0; first < rows; first += 8) {
    int count = std::min(8, rows - first);
    v16 acc[8] = {};
    for (int r = 0; kAdd && r < count; r++) acc[r] = load(c + (first + r) * width);
    for (int64_t k = 0; k < in; k += 2) {
      v16 even, odd;
      pair(panel + k * kColumns, even, odd);
      for (int r = 0; r < count; r++) {
        const bf16* at = x + (first + r) * stride + k;
        acc[r] += to_float(at[0]) * even + to_float(at[1]) * odd;
      }
    }
    for (int r = 0; r < count; r++) store(c + (first + r) * width, acc[r]);
  }
}

#ifdef __AMX_BF16__
inline bool allow_amx() {  // Linux gives the tiles' registers to whoever asks
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

// GCC does not know that tile loads read memory: what is stored above stays above.
inline void after_stores() { asm volatile("" ::: "memory"); }

// Tiles 0-3 hold results, 4 and 5 rows (5 the last, maybe shorter, ones), 6 and 7 weights.
inline void configure_tiles(int row_tiles, int last_rows) {
  alignas(64) struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; tile++) {
    config.bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  if (row_tiles > 0) config.rows[row_tiles - 1] = config.rows[5] = last_rows;
  asm volatile("" ::"r"(&config) : "memory");  // GCC does not know that the instruction reads it
  _tile_loadconfig(&config);
}

inline const bf16* tile_of(const bf16* panel, int64_t k, bf16*) { return panel + k * 512; }
inline const bf16* tile_of(const int8_t* panel, int64_t k, bf16* room) {
  const __m128i* from = reinterpret_cast<const __m128i*>(panel + k * 512);
  for (int i = 0; i < 32; i += 2) {  // eight bits are exact in bfloat16
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + i)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + i + 1)));
    _mm512_store_si512(room + i * 16, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  after_stores();
  return room;
}

// Tile loads overlap with nothing, least of all with a miss: whatever comes next is asked for early.
template <_mm_hint kHint, class W>
inline void fetch_weights(const W* panel, int64_t k) {
  const char* at = reinterpret_cast<const char*>(panel + k * 512);
  for (size_t line = 0; line < 512 * sizeof(W); line += 64) _mm_prefetch(at + line, kHint);
}
inline void fetch_rows(const bf16* x, int64_t stride) {
  for (int row = 0; row < 16; row++) _mm_prefetch(x + row * stride, _MM_HINT_T0);
}

template <int kTiles, bool kAdd, class W>
void multiply_amx(const bf16* x, int64_t stride, const W* panel, int64_t in, float* c, int64_t width) {
  alignas(64) bf16 room[512];
  after_stores();
  if constexpr (kAdd) {
    _tile_loadd(0, c, width * 4);
    if (kTiles > 1) _tile_loadd(1, c + 16 * width, width * 4);
    if (kTiles > 2) _tile_loadd(2, c + 32 * width, width * 4);
    if (kTiles > 3) _tile_loadd(3, c + 48 * width, width * 4);
  } else {
    _tile_zero(0);
    if (kTiles > 1) _tile_zero(1);
    if (kTiles > 2) _tile_zero(2);
    if (kTiles > 3) _tile_zero(3);
  }
  for (int64_t k = 0; k < in / kDepth; k++) {
    const bf16* at = x + k * kDepth;
    fetch_weights<_MM_HINT_T0>(panel, k + kAhead);
    _tile_loadd(6, tile_of(panel, k, room), 64);
    if (kTiles > 1) {
      _tile_loadd(4, at, stride * 2);
      _tile_dpbf16ps(0, 4, 6);
    }
    if (kTiles > 2) {
      _tile_loadd(7, at + 16 * stride, stride * 2);
      _tile_dpbf16ps(1, 7, 6);
    }
    if (kTiles > 3) {
      _tile_loadd(4, at + 32 * stride, stride * 2);
      _tile_dpbf16ps(2, 4, 6);
    }
    _tile_loadd(5, at + (kTiles - 1) * 16 * stride, stride * 2);
    if constexpr (kTiles == 1) _tile_dpbf16ps(0, 5, 6);
    if constexpr (kTiles == 2) _tile_dpbf16ps(1, 5, 6);
    if constexpr (kTiles == 3) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTiles == 4) _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, c, width * 4);
  if (kTiles > 1) _tile_stored(1, c + 16 * width, width * 4);
  if (kTiles > 2) _tile_stored(2, c + 32 * width, width * 4);
  if (kTiles > 3) _tile_stored(3, c + 48 * width, width * 4);
}

// 32 rows by two panels into c[2][32][16]; all tiles full. Meanwhile panel `ahead`, if any, comes into the L2 cache.
template <class W>
void multiply_amx_square(const bf16* x, int64_t stride, const W* panel, int64_t panel_size, int64_t in,
                         const W* ahead, float* c) {
  alignas(64) bf16 room[2][512];
  after_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in / kDepth; k++) {
    if (ahead) fetch_weights<_MM_HINT_T1>(ahead, k);
    fetch_rows(x + (k + 2) * kDepth, stride);
    fetch_rows(x + (k + 2) * kDepth + 16 * stride, stride);
    _tile_loadd(4, x + k * kDepth, stride * 2);
    _tile_loadd(6, tile_of(panel, k, room[0]), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + k * kDepth + 16 * stride, stride * 2);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, tile_of(panel + panel_size, k, room[1]), 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

template <bool kAdd = false, class W>
void multiply(const bf16* x, int64_t stride, int rows, const W* panel, int64_t in, float* c, int64_t width = kColumns) {
  if (!allow_amx()) return multiply_plain<kAdd>(x, stride, rows, panel, in, c, width);
  switch ((rows + 15) / 16) {
    case 1:
      return multiply_amx<1, kAdd>(x, stride, panel, in, c, width);
    case 2:
      return multiply_amx<2, kAdd>(x, stride, panel, in, c, width);
    case 3:
      return multiply_amx<3, kAdd>(x, stride, panel, in, c, width);
    default:
      return multiply_amx<4, kAdd>(x, stride, panel, in, c, width);
  }
}
inline void begin_rows(int rows) {
  if (allow_amx()) configure_tiles((rows + 15) / 16, (rows - 1) % 16 + 1);
}
inline void end_rows() {
  if (allow_amx()) _tile_release();
}
#else
inline bool allow_amx() { return false; }
template <bool kAdd = false, class W>
void multiply(const bf16* x, int64_t stride, int rows, const W* panel, int64_t in, float* c, int64_t width = kColumns) {
  multiply_plain<kAdd>(x, stride, rows, panel, in, c, width);
}
inline void begin_rows(int) {}
inline void end_rows() {}
#endif
template <bool kAdd = false>
void multiply(const float* x, int64_t stride, int rows, const float* panel, int64_t in, float* c,
              int64_t width = kColumns) {
  multiply_plain<kAdd>(x, stride, rows, panel, in, c, width);
}

// Whether this CPU multiplies bfloat16: in matrix registers, or by dot products.
inline bool multiplies_bf16() {
#ifdef __AVX512BF16__
  return true;
#else
  return allow_amx();
#endif
}

// The same by `panels` of them, `size` elements from one to the next: c[rows][16 panels], or added to it.
template <bool kAdd, class T>
void multiply_side_by_side(const T* x, int64_t stride, int rows, const T* panel, int64_t size, int64_t panels, int64_t in,
                           float* c, int64_t width) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if (!allow_amx()) {
      for (int64_t p = 0; p < panels; p += dots::kPanels)
        dots::multiply(static_cast<int>(std::min<int64_t>(dots::kPanels, panels - p)), rows, x, stride,
                       panel + p * size, size, in, kAdd, c + p * kColumns, kColumns, width);
      return;
    }
  }
#endif
  for (int64_t p = 0; p < panels; p++)
    multiply<kAdd>(x, stride, rows, panel + p * size, in, c + p * kColumns, width);
}

// ---- what becomes of the products

template <class T>
struct Sink {
  const Linear& w;
  Out mode;
  Activation act;
  void* out;
  int64_t stride;

  // c[rows][16] of `panel`, and the next panel's, if given; gated mode needs them.
  void take(int64_t panel, int64_t first_row, int rows, const float* c, const float* next) const {
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
  // Where a panel's columns go, and what they are multiplied with and added to.
  struct Columns {
    int64_t first;
    int valid;
    v16 scale, bias;
  };

  Columns columns_of(int64_t panel) const {
    int64_t first = (w.paired ? panel / 2 : panel) * kColumns, limit = w.paired ? w.out / 2 : w.out;
    int valid = static_cast<int>(std::min<int64_t>(kColumns, limit - first));
    if (w.paired && mode != Out::gated && panel % 2) first += limit;  // the second half of the result
    return {first, valid, w.scales ? load(w.scales + panel * kColumns) : splat(1),
            w.bias ? load(w.bias + panel * kColumns) : splat(0)};
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

  template <Out kMode, Activation kAct>
  void write(int64_t panel, int64_t first_row, int rows, const float* c, const float* next) const {
    Columns left = columns_of(panel), right = next ? columns_of(panel + 1) : left;
    auto* x = static_cast<Result<kMode>*>(out) + first_row * stride;
    for (int r = 0; r < rows; r++, x += stride, c += kColumns) {
      v16 y = activate<kAct>(load(c) * left.scale + left.bias);
      if (kMode == Out::gated) y *= load(next + r * kColumns) * right.scale + right.bias;
      put<kMode>(x + left.first, y, left.valid);
      if (kMode != Out::gated && next)  // the same line of memory, while it is at hand
        put<kMode>(x + right.first, activate<kAct>(load(next + r * kColumns) * right.scale + right.bias), right.valid);
    }
  }
};

#ifdef __AVX512BF16__
// Items of 4 panels (for few rows of more, in order, so that the memory can be asked ahead), those that do not come
// out even for all threads halved. Panels outside, rows inside: a block's rows and 4 panels stay in the L2 cache.
template <class W>
void linear_by_dots(Pool& pool, const Linear& w, const bf16* x, int64_t rows, int64_t stride, const Sink<bf16>& sink,
                    int64_t width, int64_t block) {
  const W* panels = static_cast<const W*>(w.panels);
  const int64_t size = panel_elements(w), threads = pool.threads(), blocks = (rows + block - 1) / block;
  const int group = dots::panels_at_once(rows);
  const int64_t step = rows <= dots::most_rows(group) ? std::max<int64_t>(4, width / (4 * threads) / 4 * 4) : 4;
  const int64_t whole = width / (step * threads) * threads, halves = (width - whole * step + 1) / 2;
  pool.run(blocks * (whole + halves), [&](int64_t item) {
    const int64_t row = item / (whole + halves) * block, end = std::min(rows, row + block);
    const int64_t at = item % (whole + halves);
    const int64_t first = at < whole ? at * step : whole * step + (at - whole) * 2;
    const int64_t last = std::min(width, first + (at < whole ? step : 2));
    alignas(64) float c[dots::kPanels * kRows * kColumns];
    for (int64_t p = first; p < last; p += group) {
      const int count = static_cast<int>(std::min<int64_t>(group, last - p));
      const int64_t later = p + group < last ? p + group : p + step * threads;
      const W* next = rows <= kRows && later + count <= width ? panels + later * size : nullptr;
      for (int64_t r = row; r < end; r += kRows) {
        const int n = static_cast<int>(std::min<int64_t>(kRows, end - r));
        dots::multiply(count, n, x + r * stride, stride, panels + p * size, size, w.in, false, c, kRows * kColumns,
                       kColumns, next);
        for (int i = 0; i < count; i += 2)
          sink.take(p + i, r, n, c + i * kRows * kColumns, i + 1 < count ? c + (i + 1) * kRows * kColumns : nullptr);
      }
    }
  });
}
#endif

template <class T, class W>
void linear(Pool& pool, const Linear& w, const T* x, int64_t rows, int64_t stride, const Sink<T>& sink) {
  int64_t width = w.paired ? (w.out / 2 + kColumns - 1) / kColumns * 2 : (w.out + kColumns - 1) / kColumns;
  const W* panels = static_cast<const W*>(w.panels);
  int64_t size = panel_elements(w);
  int64_t block = rows <= kRows ? kRows : 256, blocks = (rows + block - 1) / block;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if (!allow_amx()) return linear_by_dots<W>(pool, w, x, rows, stride, sink, width, block);
  }
#endif
  // panels of an item: even, so that pairs stay together; in order, so that the memory can be asked ahead
  int64_t step = rows <= kRows ? (width / (4 * pool.threads()) + 2) / 2 * 2 : 24;
  int64_t columns = (width + step - 1) / step;
  pool.run(blocks * columns, [&](int64_t item) {
    int64_t row = item / columns * block, end = std::min(rows, row + block);
    int64_t first = item % columns * step, last = std::min(width, first + step);
    alignas(64) float c[2 * kRows * kColumns];
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) == 2) {
      if (rows >= 32 && allow_amx()) {
        configure_tiles(0, 0);
        int64_t full = row + (end - row) / 32 * 32;
        auto square = [&](int64_t r, int64_t p, const W* ahead) {
          multiply_amx_square(x + r * stride, stride, panels + p * size, size, w.in, ahead, c);
          sink.take(p, r, 32, c, c + 512);
        };
        if (rows <= kRows) {  // the weights come from memory: each once, the next two panels meanwhile
          for (int64_t p = first; p + 1 < last; p += 2)
            for (int64_t r = row; r < full; r += 32) square(r, p, panels + (p + (r == row ? 2 : 3)) * size);
        } else {
          for (int64_t r = row; r < full; r += 32)
            for (int64_t p = first; p + 1 < last; p += 2) square(r, p, nullptr);
        }
        end_rows();
        if ((last - first) % 2) {  // a panel without a neighbour
          for (int64_t r = row; r < full; r += kRows) {
            int count = static_cast<int>(std::min<int64_t>(kRows, full - r));
            begin_rows(count);
            multiply(x + r * stride, stride, count, panels + (last - 1) * size, w.in, c);
            end_rows();
            sink.take(last - 1, r, count, c, nullptr);
          }
        }
        row = full;
      }
    }
#endif
    for (; row < end; row += kRows) {
      int count = static_cast<int>(std::min<int64_t>(kRows, end - row));
      if (sizeof(T) == 2) begin_rows(count);
      for (int64_t p = first; p < last; p++) {
        multiply(x + row * stride, stride, count, panels + p * size, w.in, c);
        if (sink.mode == Out::gated) {
          multiply(x + row * stride, stride, count, panels + (p + 1) * size, w.in, c + kRows * kColumns);
          sink.take(p++, row, count, c, c + kRows * kColumns);
        } else {
          sink.take(p, row, count, c, nullptr);
        }
      }
      if (sizeof(T) == 2) end_rows();
    }
  });
}
