// Products of bfloat16 rows and packed weights by AVX-512's dot products, for CPUs without matrix registers.
//
// What fits into the registers: 6 rows by 4 panels, or 12 by 2: 24 sums of 16 columns; a panel's pair of inputs is one
// vector, a row's one number that is broadcast. Each sum goes over the inputs in their order, whatever rows and panels
// stand beside it: the same row has the same bits alone and in any batch.
#pragma once
#ifdef __AVX512BF16__
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "vec.h"

namespace dots {
constexpr int kPanels = 4, kFew = 4;
constexpr int64_t most_rows(int panels) { return panels <= 2 ? 12 : 6; }
// How many panels stand side by side: the fewer, the more rows fit, and each panel is read once.
constexpr int panels_at_once(int64_t rows) { return rows > most_rows(4) && rows <= most_rows(2) ? 2 : 4; }
constexpr int64_t kColumns = 16, kTile = 32;  // inputs of a tile: 1 KiB of a panel
constexpr int64_t kPart = 2048;               // inputs at once: 4 panels of as many stay in the L2 cache
constexpr int64_t kAhead = 1024;              // elements of a panel that comes from memory

inline __m512bh load_pair(const bf16* at) { return (__m512bh)_mm512_loadu_si512(at); }
inline __m512bh load_pair(const int8_t* at) {  // eight bits are exact in bfloat16
  const __m128i* from = reinterpret_cast<const __m128i*>(at);
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
  return _mm512_cvtne2ps_pbh(high, low);
}
inline __m512bh broadcast_pair(const bf16* at) {
  int32_t both;
  std::memcpy(&both, at, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// Memory that is wanted soon: so many lines of it are asked for at every tile.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;
};

// kN rows by kP panels, `size` elements from one to the next; c: kP blocks `step` apart, `width` from row to row.
template <int kN, int kP, class W>
void multiply(const bf16* x, int64_t stride, const W* panel, int64_t size, int64_t in, bool add, float* c,
              int64_t step, int64_t width, Ahead& ahead) {
  __m512 sums[kN][kP];
#pragma GCC unroll 24
  for (int r = 0; r < kN; r++)
#pragma GCC unroll 4
    for (int p = 0; p < kP; p++)
      sums[r][p] = add ? _mm512_loadu_ps(c + p * step + r * width) : _mm512_setzero_ps();
  for (int64_t tile = 0; tile < in; tile += kTile) {
    for (int64_t line = 0; line < ahead.lines; line++, ahead.at += 64) _mm_prefetch(ahead.at, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int64_t k = tile; k < tile + kTile; k += 2) {
      __m512bh w[kP];
#pragma GCC unroll 4
      for (int p = 0; p < kP; p++) {
        w[p] = load_pair(panel + p * size + k * kColumns);
        if (!ahead.at) _mm_prefetch(reinterpret_cast<const char*>(panel + p * size + k * kColumns + kAhead), _MM_HINT_T0);
      }
#pragma GCC unroll 24
      for (int r = 0; r < kN; r++) {
        __m512bh row = broadcast_pair(x + r * stride + k);
#pragma GCC unroll 4
        for (int p = 0; p < kP; p++) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], row, w[p]);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kN; r++)
#pragma GCC unroll 4
    for (int p = 0; p < kP; p++) _mm512_storeu_ps(c + p * step + r * width, sums[r][p]);
}

// Up to most_rows(kP) rows, then up to 4 panels: whichever of the above it takes.
template <int kP, int kN, class W>
void rows_by(int64_t rows, const bf16* x, int64_t stride, const W* panel, int64_t size, int64_t in, bool add, float* c,
             int64_t step, int64_t width, Ahead& ahead) {
  if constexpr (kN > 1)
    if (rows < kN) return rows_by<kP, kN - 1>(rows, x, stride, panel, size, in, add, c, step, width, ahead);
  multiply<kN, kP>(x, stride, panel, size, in, add, c, step, width, ahead);
}
template <class W>
void panels_by(int panels, int64_t rows, const bf16* x, int64_t stride, const W* panel, int64_t size, int64_t in,
               bool add, float* c, int64_t step, int64_t width, Ahead& ahead) {
  switch (panels) {
    case 1:
      return rows_by<1, most_rows(1)>(rows, x, stride, panel, size, in, add, c, step, width, ahead);
    case 2:
      return rows_by<2, most_rows(2)>(rows, x, stride, panel, size, in, add, c, step, width, ahead);
    case 3:
      return rows_by<3, most_rows(3)>(rows, x, stride, panel, size, in, add, c, step, width, ahead);
    default:
      return rows_by<4, most_rows(4)>(rows, x, stride, panel, size, in, add, c, step, width, ahead);
  }
}

// Any number of rows by up to 4 panels, over all inputs; what lies at `next` is fetched meanwhile, if given.
template <class W>
void multiply(int panels, int64_t rows, const bf16* x, int64_t stride, const W* panel, int64_t size, int64_t in,
              bool add, float* c, int64_t step, int64_t width, const W* next = nullptr) {
  if (rows <= kFew && panels > 1) {  // nothing but the memory counts, which likes one stream best
    for (int p = 0; p < panels; p++)
      multiply(1, rows, x, stride, panel + p * size, size, in, add, c + p * step, step, width, next);
    return;
  }
  const int64_t most = most_rows(panels), turns = (rows + most - 1) / most;
  for (int64_t from = 0; from < in; from += kPart) {
    const int64_t count = std::min(kPart, in - from);
    const W* weights = panel + from * kColumns;
    // The first rows bring the weights, the others have the time to ask for what comes next.
    Ahead none, ahead;
    if (next && turns > 1) {
      int64_t lines = panels * in * kColumns * static_cast<int64_t>(sizeof(W)) / 64, tiles = (turns - 1) * (in / kTile);
      ahead = {reinterpret_cast<const char*>(next + from * kColumns * panels), (lines + tiles - 1) / tiles};
    } else if (turns > 1) {
      ahead = {reinterpret_cast<const char*>(panel), 0};
    }
    auto turn = [&](int64_t row, const auto* w, int64_t w_size) {
      panels_by(panels, std::min(most, rows - row), x + row * stride + from, stride, w, w_size, count, add || from > 0, c + row * width, step,
                width, row == 0 ? none : ahead);
    };
    if constexpr (sizeof(W) == 1) {
      if (turns > 1) {  // widened once for all rows
        thread_local std::vector<bf16> wide;
        wide.resize(kPanels * kPart * kColumns);
        for (int p = 0; p < panels; p++)
          for (int64_t i = 0; i < count * kColumns; i += 32)
            _mm512_storeu_si512(wide.data() + p * count * kColumns + i, (__m512i)load_pair(weights + p * size + i));
        for (int64_t row = 0; row < rows; row += most) turn(row, wide.data(), count * kColumns);
        continue;
      }
    }
    for (int64_t row = 0; row < rows; row += most) turn(row, weights, size);
  }
}
}  // namespace dots
#endif
