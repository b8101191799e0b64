// Products of rows and packed weights (linear.h) by what the CPU has: matrix registers, dot products, vectors. float and
// bfloat16 rows are summed in float, rows of 8 bits in int32_t, which is exact: there, all three give the same sums.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "dots.h"
#include "plain.h"
#include "vec.h"

// Rows that are multiplied with weights of W, and what sums of their products are.
template <class W>
using RowOf = std::conditional_t<sizeof(W) == 1, uint8_t, W>;
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
// What rows of X are read as: themselves, where something multiplies these, else what vectors do (plain.h).
template <class X>
using Read = std::conditional_t<has_dots<X>() || sizeof(X) == 4, X, std::conditional_t<sizeof(X) == 2, float, int8_t>>;

template <class X>
void read(const X* from, Read<X>* to, int64_t count) {
  if constexpr (std::is_same_v<X, Read<X>>) std::copy(from, from + count, to);
  else widen(from, to, count);
}

// Some rows of `depth` numbers to be multiplied with many panels: where they lie, or in memory of the thread that asks,
// which gets the same for its next ones.
template <class X>
struct ReadRows {
  const Read<X>* x;
  int64_t stride;

  // each(rows, body): body(row) for all of them.
  template <class Each>
  ReadRows(const X* from, int64_t from_stride, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t depth,
           [[maybe_unused]] const Each& each) {
    if constexpr (std::is_same_v<X, Read<X>>) {
      x = from, stride = from_stride;
    } else {
      thread_local std::vector<Read<X>> memory;
      memory.resize(rows * depth);
      Read<X>* to = memory.data();  // whichever thread reads
      each(rows, [=](int64_t row) { read(from + row * from_stride, to + row * depth, depth); });
      x = to, stride = depth;
    }
  }
  ReadRows(const Read<X>* x, int64_t stride) : x(x), stride(stride) {}
  ReadRows from(int64_t row) const { return {x + row * stride, stride}; }
};

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

// Up to 64 rows by one panel into c[rows][16], or added to it; `width` from row to row of c. By matrix registers or
// vectors: dot products take several panels at once.
template <bool kAdd = false, class W>
void multiply(const Read<RowOf<W>>* x, int64_t stride, int rows, const W* panel, int64_t in, SumOf<RowOf<W>>* c,
              int64_t width = kColumns, [[maybe_unused]] const W* next = nullptr) {
#ifdef PRAD_AMX
  if constexpr (sizeof(W) < 4) {
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
#endif
  if constexpr (!has_dots<RowOf<W>>()) multiply_plain<kAdd>(x, stride, rows, panel, in, c, width, next);
}

// The same by `panels` of them, `size` elements from one to the next: c[rows][16 panels], or added to it.
template <bool kAdd, class W>
void multiply_side_by_side(const Read<W>* x, int64_t stride, int rows, const W* panel, int64_t size, int64_t panels,
                           int64_t in, float* c, int64_t width) {
#ifdef __AVX512VNNI__
  if constexpr (has_dots<W>()) {
    if (!in_tiles<W>()) {
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
