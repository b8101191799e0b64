// Products of rows and packed weights (linear.h) in vectors of 16 columns, on any CPU. Each sum goes over the inputs in
// their order, whatever rows stand beside it: the same row has the same bits alone and in any batch.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int kColumns = 16;

namespace plain {
constexpr int kMost = kRegisters == 2 ? 6 : 8;  // rows whose sums stay in registers

// Up to kMost rows in a turn, as many in each as come out even: body<their number, kSoon>(the first, which turn, of how
// many). kSoon: the memory is slower than the arithmetic of so few, and weights are to be asked for ahead.
template <int kN, bool kSoon, class Body>
void some_rows(int n, const Body& body, int row, int turn, int turns) {
  if constexpr (kN > 1)
    if (n < kN) return some_rows<kN - 1, kSoon>(n, body, row, turn, turns);
  body.template operator()<kN, kSoon>(row, turn, turns);
}
template <class Body>
void each_some(int rows, const Body& body) {
  constexpr int kFew = 4;
  const int turns = (rows + kMost - 1) / kMost, most = (rows + turns - 1) / turns;
  for (int row = 0, turn = 0; row < rows; row += most, turn++)
    if (turns <= kFew) some_rows<kMost, true>(std::min(most, rows - row), body, row, turn, turns);
    else some_rows<kMost, false>(std::min(most, rows - row), body, row, turn, turns);
}

// Weights that are wanted soon. Rows of one turn ask for what is 1 KiB further on; those of several ask in each for a
// part of the next panel, if that is known: the first turn would wait for it, and the others leave the memory idle.
struct Ahead {
  const char* at;
  int pace;  // bytes, for each line that is used

  Ahead(const void* panel, const void* next, int64_t bytes, int turn, int turns)
      : at(static_cast<const char*>(panel) + 1024), pace(64) {
    if (turns > 1 && next) at = static_cast<const char*>(next) + bytes / turns * turn, pace = 64 / turns + 1;
  }
  void ask() {
    __builtin_prefetch(at);
    at += pace;
  }
};

// The inputs from k on of kN rows by a panel's weights for them, which are added to the sums.
constexpr int64_t inputs_at_once(const float*) { return 1; }
constexpr int64_t inputs_at_once(const bf16*) { return 2; }
template <bool kSoon, int kN>
inline void add_inputs(const float* x, int64_t stride, const float* weights, Ahead& ahead, v16 (&sums)[kN]) {
  const v16 w = load(weights);
  if (kSoon) ahead.ask();
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride]), w); });
}
template <bool kSoon, int kN>
inline void add_inputs(const float* x, int64_t stride, const bf16* weights, Ahead& ahead, v16 (&sums)[kN]) {
  const v16 even = (v16)(load_lanes(weights) << 16);
  if (kSoon) ahead.ask();
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride]), even); });
  asm("" : "+r"(weights));  // loaded anew: there is no register to keep them in
  const v16 odd = (v16)(load_lanes(weights) & 0xffff0000u);
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride + 1]), odd); });
}
}  // namespace plain

// Any number of rows by one panel into c[rows][16], or added to it; `width` from row to row of c; `next`: the panel that
// is likely to follow.
template <bool kAdd = false, class W>
void multiply_plain(const float* x, int64_t stride, int rows, const W* panel, int64_t in, float* c, int64_t width,
                    const W* next = nullptr) {
  constexpr int64_t kStep = plain::inputs_at_once(static_cast<const W*>(nullptr));
  plain::each_some(rows, [&]<int kN, bool kSoon>(int row, int turn, int turns) {
    plain::Ahead ahead(panel, next, in * kColumns * sizeof(W), turn, turns);
    v16 sums[kN];
    float* to = c + row * width;
    each<kN>([&](auto r) { sums[r] = kAdd ? load(to + r * width) : v16{}; });
    for (int64_t k = 0; k < in; k += kStep)
      plain::add_inputs<kSoon, kN>(x + row * stride + k, stride, panel + k * kColumns, ahead, sums);
    each<kN>([&](auto r) { store(to + r * width, sums[r]); });
  });
}

// Rows as the products here read them: bfloat16 as floats; of every four bytes the first and the third, then the others,
// in 16 bits.
inline void widen(const bf16* from, float* to, int64_t count) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store(to + k, load(from + k));
  for (; k < count; k++) to[k] = to_float(from[k]);
}
template <class Byte>
void widen(const Byte* from, int16_t* to, int64_t count) {  // a multiple of four
  for (int64_t k = 0; k < count; k += 4)
    to[k] = from[k], to[k + 1] = from[k + 2], to[k + 2] = from[k + 1], to[k + 3] = from[k + 3];
}

// Two numbers of 16 bits, or four of 8, in every lane.
inline u16x lanes_of(const void* at) {
  uint32_t lane;
  std::memcpy(&lane, at, 4);
  return u16x{} + lane;
}

template <bool = false>  // never added to
void multiply_plain(const int16_t* x, int64_t stride, int rows, const int8_t* panel, int64_t in, int32_t* c,
                    int64_t width, const int8_t* next = nullptr) {
  plain::each_some(rows, [&]<int kN, bool kSoon>(int row, int turn, int turns) {
    plain::Ahead ahead(panel, next, in * kColumns, turn, turns);
    i16x sums[kN];
    each<kN>([&](auto r) { sums[r] = i16x{}; });
    for (int64_t k = 0; k < in; k += 4) {
      const int16_t* at = x + row * stride + k;
      const int8_t* weights = panel + k * kColumns;
      const u16x even = lower_bytes(load_lanes(weights));
      if (kSoon) ahead.ask();
      each<kN>([&](auto r) { add_to(sums[r], multiply_pairs(even, lanes_of(at + r * stride))); });
      asm("" : "+r"(weights));  // loaded anew: there is no register to keep them in
      const u16x odd = upper_bytes(load_lanes(weights));
      each<kN>([&](auto r) { add_to(sums[r], multiply_pairs(odd, lanes_of(at + r * stride + 2))); });
    }
    each<kN>([&](auto r) { store_lanes(c + (row + r) * width, (u16x)sums[r]); });
  });
}
