// Products of rows and packed weights (linear.h) in Intel's matrix registers: bfloat16, and 8 bits unsigned by signed.
#pragma once
#include <cstdint>
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define PRAD_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vec.h"

inline bool allow_amx() {  // Linux gives the tiles' registers to whoever asks
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

namespace amx {
constexpr int64_t kTile = 1024, kLine = 64;  // bytes of a panel's tile, of a row beside it
constexpr int kAhead = 8;                    // tiles

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

// The intrinsics are macros that want their tiles' numbers as they are written.
#define PRAD_ADD_PRODUCTS(sums, rows, weights)                          \
  do {                                                                  \
    if constexpr (sizeof(X) == 1) _tile_dpbusd(sums, rows, weights);    \
    else _tile_dpbf16ps(sums, rows, weights);                           \
  } while (0)

// Tile loads overlap with nothing, least of all with a miss: whatever comes next is asked for early. Inline always: GCC
// leaves a call out that does nothing else.
template <_mm_hint kHint>
__attribute__((always_inline)) inline void fetch_weights(const char* panel, int64_t k) {
  for (int64_t line = 0; line < kTile; line += 64) _mm_prefetch(panel + k * kTile + line, kHint);
}
__attribute__((always_inline)) inline void fetch_rows(const char* x, int64_t stride) {
  for (int row = 0; row < 16; row++) _mm_prefetch(x + row * stride, _MM_HINT_T0);
}

// Up to kTiles * 16 rows by one panel into c[rows][16], or added to it; X: bf16 or uint8_t, C: float or int32_t.
template <int kTiles, bool kAdd, class X, class C>
void multiply(const X* rows, int64_t x_stride, const void* weights, int64_t in, C* c, int64_t width) {
  const char *x = reinterpret_cast<const char*>(rows), *panel = static_cast<const char*>(weights);
  const int64_t stride = x_stride * sizeof(X);
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
  for (int64_t k = 0; k < in * static_cast<int64_t>(sizeof(X)) / kLine; k++) {
    const char* at = x + k * kLine;
    fetch_weights<_MM_HINT_T0>(panel, k + kAhead);
    _tile_loadd(6, panel + k * kTile, 64);
    if (kTiles > 1) {
      _tile_loadd(4, at, stride);
      PRAD_ADD_PRODUCTS(0, 4, 6);
    }
    if (kTiles > 2) {
      _tile_loadd(7, at + 16 * stride, stride);
      PRAD_ADD_PRODUCTS(1, 7, 6);
    }
    if (kTiles > 3) {
      _tile_loadd(4, at + 32 * stride, stride);
      PRAD_ADD_PRODUCTS(2, 4, 6);
    }
    _tile_loadd(5, at + (kTiles - 1) * 16 * stride, stride);
    if constexpr (kTiles == 1) PRAD_ADD_PRODUCTS(0, 5, 6);
    if constexpr (kTiles == 2) PRAD_ADD_PRODUCTS(1, 5, 6);
    if constexpr (kTiles == 3) PRAD_ADD_PRODUCTS(2, 5, 6);
    if constexpr (kTiles == 4) PRAD_ADD_PRODUCTS(3, 5, 6);
  }
  _tile_stored(0, c, width * 4);
  if (kTiles > 1) _tile_stored(1, c + 16 * width, width * 4);
  if (kTiles > 2) _tile_stored(2, c + 32 * width, width * 4);
  if (kTiles > 3) _tile_stored(3, c + 48 * width, width * 4);
}

// 32 rows by two panels, `size` bytes from one to the next, into c[2][32][16]; all tiles full. Meanwhile panel `ahead`,
// if any, comes into the L2 cache.
template <class X, class C>
void multiply_square(const X* rows, int64_t x_stride, const void* weights, int64_t size, int64_t in, const void* ahead,
                     C* c) {
  const char *x = reinterpret_cast<const char*>(rows), *panel = static_cast<const char*>(weights);
  const int64_t stride = x_stride * sizeof(X);
  after_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in * static_cast<int64_t>(sizeof(X)) / kLine; k++) {
    if (ahead) fetch_weights<_MM_HINT_T1>(static_cast<const char*>(ahead), k);
    fetch_rows(x + (k + 2) * kLine, stride);
    fetch_rows(x + (k + 2) * kLine + 16 * stride, stride);
    _tile_loadd(4, x + k * kLine, stride);
    _tile_loadd(6, panel + k * kTile, 64);
    PRAD_ADD_PRODUCTS(0, 4, 6);
    _tile_loadd(5, x + k * kLine + 16 * stride, stride);
    PRAD_ADD_PRODUCTS(1, 5, 6);
    _tile_loadd(7, panel + size + k * kTile, 64);
    PRAD_ADD_PRODUCTS(2, 4, 7);
    PRAD_ADD_PRODUCTS(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}
#undef PRAD_ADD_PRODUCTS
}  // namespace amx
#else
inline bool allow_amx() { return false; }
#endif
