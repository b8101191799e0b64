// Products of rows and packed weights by AVX-512's dot products, for CPUs without matrix registers.
//
// What fits into the registers: 6 rows by 4 panels, or 12 by 2: 24 sums of 16 columns. A panel's lanes, 32 bits for each
// column, are one vector, a row's lane is one number that is broadcast; whether a lane is two numbers in bfloat16 or
// four of 8 bits makes no difference to the order of things. Each sum goes over the inputs in their order, whatever rows
// and panels stand beside it: the same row has the same bits alone and in any batch.
#pragma once
#ifdef __AVX512VNNI__  // where there is AVX512_BF16, there is this
#include <immintrin.h>

#include <algorithm>

#include "vec.h"

namespace dots {
constexpr int kPanels = 4, kFew = 8;
constexpr int64_t most_rows(int panels) { return panels <= 2 ? 12 : 6; }
// How many panels stand side by side: the fewer, the more rows fit, and each panel is read once.
constexpr int panels_at_once(int64_t rows) { return rows > most_rows(4) && rows <= most_rows(2) ? 2 : 4; }
constexpr int64_t kColumns = 16, kTile = 16;  // lanes of a tile: 1 KiB of a panel
constexpr int64_t kPart = 1024;               // lanes at once: 4 panels of as many stay in the L2 cache
constexpr int64_t kAhead = 512;               // lanes of a panel that comes from memory

typedef int32_t Lane;  // inputs of a row or of a column's weights; or a sum, float or int32_t

#ifdef __AVX512BF16__
struct Pairs {
  static __m512i add(__m512i sums, __m512i row, __m512i weights) {
    return (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)row, (__m512bh)weights);
  }
};
#endif
struct Quads {  // unsigned by signed
  static __m512i add(__m512i sums, __m512i row, __m512i weights) { return _mm512_dpbusd_epi32(sums, row, weights); }
};

inline __m512i broadcast(const char* at) {
  Lane lane;
  std::memcpy(&lane, at, 4);
  return _mm512_set1_epi32(lane);
}

// Memory that is wanted soon: so many lines of it are asked for at every tile.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;
};

// What goes where. x: rows of `stride` bytes; panel: `size` lanes from one to the next; c: blocks of a panel's sums
// `step` apart, `width` from row to row. Lanes are read and written as vectors only.
struct Places {
  const char* x;
  int64_t stride;
  const Lane* panel;
  int64_t size;
  Lane* c;
  int64_t step, width;
};

// kN rows by kP panels over `depth` lanes.
template <class Dot, int kN, int kP>
void multiply(const Places& at, int64_t depth, bool add, Ahead& ahead) {
  __m512i sums[kN][kP];
#pragma GCC unroll 24
  for (int r = 0; r < kN; r++)
#pragma GCC unroll 4
    for (int p = 0; p < kP; p++)
      sums[r][p] = add ? _mm512_loadu_si512(at.c + p * at.step + r * at.width) : _mm512_setzero_si512();
  for (int64_t tile = 0; tile < depth; tile += kTile) {
    for (int64_t line = 0; line < ahead.lines; line++, ahead.at += 64) _mm_prefetch(ahead.at, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int64_t k = tile; k < tile + kTile; k++) {
      __m512i w[kP];
#pragma GCC unroll 4
      for (int p = 0; p < kP; p++) {
        const Lane* from = at.panel + p * at.size + k * kColumns;
        w[p] = _mm512_loadu_si512(from);
        if (!ahead.at) _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
      }
#pragma GCC unroll 24
      for (int r = 0; r < kN; r++) {
        __m512i row = broadcast(at.x + r * at.stride + k * sizeof(Lane));
#pragma GCC unroll 4
        for (int p = 0; p < kP; p++) sums[r][p] = Dot::add(sums[r][p], row, w[p]);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kN; r++)
#pragma GCC unroll 4
    for (int p = 0; p < kP; p++) _mm512_storeu_si512(at.c + p * at.step + r * at.width, sums[r][p]);
}

// Up to most_rows(kP) rows, then up to 4 panels: whichever of the above it takes.
template <class Dot, int kP, int kN>
void rows_by(int64_t rows, const Places& at, int64_t depth, bool add, Ahead& ahead) {
  if constexpr (kN > 1)
    if (rows < kN) return rows_by<Dot, kP, kN - 1>(rows, at, depth, add, ahead);
  multiply<Dot, kN, kP>(at, depth, add, ahead);
}
template <class Dot>
void panels_by(int panels, int64_t rows, const Places& at, int64_t depth, bool add, Ahead& ahead) {
  switch (panels) {
    case 1:
      return rows_by<Dot, 1, most_rows(1)>(rows, at, depth, add, ahead);
    case 2:
      return rows_by<Dot, 2, most_rows(2)>(rows, at, depth, add, ahead);
    case 3:
      return rows_by<Dot, 3, most_rows(3)>(rows, at, depth, add, ahead);
    default:
      return rows_by<Dot, 4, most_rows(4)>(rows, at, depth, add, ahead);
  }
}

// Any number of rows by up to 4 panels; what lies at `next` is fetched meanwhile, if given.
template <class Dot>
void multiply(int panels, int64_t rows, const Places& at, int64_t depth, bool add, const Lane* next) {
  if (rows <= kFew && panels > 1) {  // nothing but the memory counts, which likes one stream best
    for (int p = 0; p < panels; p++)
      multiply<Dot>(1, rows, {at.x, at.stride, at.panel + p * at.size, at.size, at.c + p * at.step, at.step, at.width},
                    depth, add, next);
    return;
  }
  const int64_t most = most_rows(panels), turns = (rows + most - 1) / most;
  for (int64_t from = 0; from < depth; from += kPart) {
    const int64_t count = std::min(kPart, depth - from);
    // The first rows bring the weights, the others have the time to ask for what comes next.
    Ahead none, ahead;
    if (next && turns > 1) {
      int64_t lines = panels * depth, tiles = (turns - 1) * (depth / kTile);
      ahead = {reinterpret_cast<const char*>(next + from * kColumns * panels), (lines + tiles - 1) / tiles};
    } else if (turns > 1) {
      ahead = {reinterpret_cast<const char*>(at.panel), 0};
    }
    for (int64_t row = 0; row < rows; row += most)
      panels_by<Dot>(panels, std::min(most, rows - row),
                     {at.x + row * at.stride + from * static_cast<int64_t>(sizeof(Lane)), at.stride,
                      at.panel + from * kColumns, at.size, at.c + row * at.width, at.step, at.width},
                     count, add || from > 0, row == 0 ? none : ahead);
  }
}

inline const Lane* lanes(const void* weights) { return static_cast<const Lane*>(weights); }
inline Lane* lanes(void* sums) { return static_cast<Lane*>(sums); }

#ifdef __AVX512BF16__
inline void multiply(int panels, int64_t rows, const bf16* x, int64_t stride, const bf16* panel, int64_t size,
                     int64_t in, bool add, float* c, int64_t step, int64_t width, const bf16* next = nullptr) {
  const char* from = reinterpret_cast<const char*>(x);
  multiply<Pairs>(panels, rows, {from, stride * 2, lanes(panel), size / 2, lanes(c), step, width}, in / 2, add,
                  lanes(next));
}
#endif
inline void multiply(int panels, int64_t rows, const uint8_t* x, int64_t stride, const int8_t* panel, int64_t size,
                     int64_t in, bool add, int32_t* c, int64_t step, int64_t width, const int8_t* next = nullptr) {
  const char* from = reinterpret_cast<const char*>(x);
  multiply<Quads>(panels, rows, {from, stride, lanes(panel), size / 4, c, step, width}, in / 4, add, lanes(next));
}
}  // namespace dots
#endif
