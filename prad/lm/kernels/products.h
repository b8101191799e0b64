// Products of rows and packed weights (linear.h) by what the CPU has: matrix registers, dot products, vectors. float and
// bfloat16 rows are summed in float, rows of 8 bits in int32_t, which is exact: there, all three give the same sums.
#pragma once
#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "dots.h"
#include "plain.h"
#include "vec.h"

template <class X>
using SumOf = std::conditional_t<sizeof(X) == 1, int32_t, float>;

// Whether rows of X are multiplied in matrix registers, or by dot products.
template <class X>
bool in_tiles() {
  return sizeof(X) < 4 && allow_amx();
}
template <class X>
constexpr bool has_dots() {
#ifdef __AVX512BF16__
  if (sizeof(X) == 2) return true;
#endif
#ifdef __AVX512VNNI__
  if (sizeof(X) == 1) return true;
#endif
  return false;
}
// Whether this CPU multiplies bfloat16 other than by widening it.
inline bool multiplies_bf16() { return has_dots<bf16>() || in_tiles<bf16>(); }

// What matrix registers must be told before up to 64 rows are multiplied, and when they are no longer needed.
template <class X>
void begin_rows([[maybe_unused]] int rows) {
#ifdef PRAD_AMX
  if (in_tiles<X>()) amx::configure_tiles((rows + 15) / 16, (rows - 1) % 16 + 1);
#endif
}
template <class X>
void end_rows() {
#ifdef PRAD_AMX
  if (in_tiles<X>()) _tile_release();
#endif
}

// Up to 64 rows by one panel into c[rows][16], or added to it; `width` from row to row of c.
template <bool kAdd = false, class X, class W>
void multiply(const X* x, int64_t stride, int rows, const W* panel, int64_t in, SumOf<X>* c, int64_t width = kColumns) {
#ifdef PRAD_AMX
  if constexpr (sizeof(X) < 4) {
    if (in_tiles<X>()) {
      switch ((rows + 15) / 16) {
        case 1:
          return amx::multiply<1, kAdd>(x, stride, panel, in, c, width);
        case 2:
          return amx::multiply<2, kAdd>(x, stride, panel, in, c, width);
        case 3:
          return amx::multiply<3, kAdd>(x, stride, panel, in, c, width);
        default:
          return amx::multiply<4, kAdd>(x, stride, panel, in, c, width);
      }
    }
  }
#endif
  if constexpr (sizeof(X) == 1) multiply_plain(x, stride, rows, panel, in, c, width);
  else multiply_plain<kAdd>(x, stride, rows, panel, in, c, width);
}

// The same by `panels` of them, `size` elements from one to the next: c[rows][16 panels], or added to it.
template <bool kAdd, class T>
void multiply_side_by_side(const T* x, int64_t stride, int rows, const T* panel, int64_t size, int64_t panels, int64_t in,
                           float* c, int64_t width) {
#ifdef __AVX512VNNI__
  if constexpr (has_dots<T>()) {
    if (!in_tiles<T>()) {
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
