// Products of rows and packed weights (linear.h) in vectors of 16 columns, on any CPU. Each sum goes over the inputs in
// their order, whatever rows stand beside it: the same row has the same bits alone and in any batch.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int kColumns = 16;

// Panels of an item where each of `blocks` of the rows meets all `panels`: whole pairs, in order, so that the memory can
// be asked ahead, and some eight items for each thread, so that all end together.
inline int64_t panels_of_item(int64_t panels, int64_t blocks, int64_t threads) {
  constexpr int64_t kItems = 8, kMostPairs = 12;
  return 2 * std::clamp<int64_t>(blocks * panels / (2 * kItems * threads), 1, kMostPairs);
}

namespace plain {
constexpr int kMost = kRegisters == 2 ? 6 : 8;  // rows whose sums stay in registers

constexpr int kFew = 4;  // up to so many turns the memory is slower than the arithmetic

// Up to kMost rows in a turn, as many in each as come out even: body<their number, kSoon>(the first, which turn, of how
// many). kSoon: weights are to be asked for ahead in this turn.
template <int kN, bool kSoon, class Body>
void some_rows(int n, const Body& body, int row, int turn, int turns) {
  if constexpr (kN > 1)
    if (n < kN) return some_rows<kN - 1, kSoon>(n, body, row, turn, turns);
  body.template operator()<kN, kSoon>(row, turn, turns);
}
template <int kMost = plain::kMost, class Body>
void each_some(int rows, const Body& body) {  // kMost: where others fit into registers
  const int turns = (rows + kMost - 1) / kMost, most = (rows + turns - 1) / turns;
  for (int row = 0, turn = 0; row < rows; row += most, turn++)
    if (turns <= kFew || turn == 1) some_rows<kMost, true>(std::min(most, rows - row), body, row, turn, turns);
    else some_rows<kMost, false>(std::min(most, rows - row), body, row, turn, turns);
}

// Weights that are wanted soon. Rows of one turn ask for what is 1 KiB further on; those of several for the next panel,
// if it is known: of a few turns each for a part of it, or the first would wait for it and the others leave the memory
// idle; of many the second for all of it.
struct Ahead {
  const char* at;
  int pace = 64;  // bytes, for each line that is used

  Ahead(const void* panel, const void* next, int64_t bytes, int turn, int turns)
      : at(turns > 1 && next ? static_cast<const char*>(next) : static_cast<const char*>(panel) + 1024) {
    if (turns > 1 && turns <= kFew && next) at += bytes / turns * turn, pace = 64 / turns + 1;
  }
  void ask() {
    __builtin_prefetch(at);
    at += pace;
  }
};

// Some inputs of kN rows by a panel's weights for them, which are added to the sums. kFirst: the panel's first, before
// which nothing may be read.
//
// Whoever computes on the other half of a core leaves it some four instructions in a cycle, not six, and takes none of
// its products: so what counts are the instructions beside these, 38 for 48 products of 6 rows by 4 inputs.
constexpr int64_t inputs_at_once(const float*) { return 1; }
constexpr int64_t inputs_at_once(const bf16*) { return 2; }
template <bool kSoon, bool kFirst, int kN>
inline void add_inputs(const float* x, int64_t stride, const float* weights, Ahead& ahead, v16 (&sums)[kN]) {
  const v16 w = load(weights);
  if (kSoon) ahead.ask();
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride]), w); });
}
template <bool kSoon, bool kFirst, int kN>
inline void add_inputs(const float* x, int64_t stride, const bf16* weights, Ahead& ahead, v16 (&sums)[kN]) {
  const v16 even = first_of_pairs<!kFirst>(weights);
  if (kSoon) ahead.ask();
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride]), even); });
  asm("" : "+r"(weights));  // loaded anew: there is no register to keep them in
  const v16 odd = second_of_pairs(weights);
  each<kN>([&](auto r) { add_product(sums[r], splat(x[r * stride + 1]), odd); });
}
}  // namespace plain

// Any number of rows by one panel into c[rows][16], or added to it; `width` from row to row of c; `next`: the panel that
// is likely to follow. `in` is at least one, and even for bfloat16.
template <bool kAdd = false, class W>
void multiply_plain(const float* x, int64_t stride, int rows, const W* panel, int64_t in, float* c, int64_t width,
                    const W* next = nullptr) {
  constexpr int64_t kStep = plain::inputs_at_once(static_cast<const W*>(nullptr));
  plain::each_some(rows, [&]<int kN, bool kSoon>(int row, int turn, int turns) {
    plain::Ahead ahead(panel, next, in * kColumns * sizeof(W), turn, turns);
    v16 sums[kN];
    float* to = c + row * width;
    each<kN>([&](auto r) { sums[r] = kAdd ? load(to + r * width) : v16{}; });
    const float* at = x + row * stride;
    const W *weights = panel, *const end = panel + in * kColumns;
    plain::add_inputs<kSoon, true, kN>(at, stride, weights, ahead, sums);
    at += kStep, weights += kStep * kColumns;
#pragma GCC unroll 2
    for (; weights != end; at += kStep, weights += kStep * kColumns)  // with < GCC keeps sums in memory
      plain::add_inputs<kSoon, false, kN>(at, stride, weights, ahead, sums);
    each<kN>([&](auto r) { store(to + r * width, sums[r]); });
  });
}

// Rows as the products here read them: bfloat16 as floats, bytes without the 128 that are added for dot products.
inline void widen(const bf16* from, float* to, int64_t count) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store(to + k, load(from + k));
  for (; k < count; k++) to[k] = to_float(from[k]);
}
inline void widen(const uint8_t* from, int8_t* to, int64_t count) {
  for (int64_t k = 0; k < count; k++) to[k] = static_cast<int8_t>(from[k] ^ 128);
}

// Four numbers of 8 bits in every lane.
inline u16x lanes_of(const void* at) {
  uint32_t lane;
  std::memcpy(&lane, at, 4);
  return u16x{} + lane;
}

// Numbers are of -127 to 127, so that two products are within 16 bits.
template <bool = false>  // never added to
void multiply_plain(const int8_t* x, int64_t stride, int rows, const int8_t* panel, int64_t in, int32_t* c,
                    int64_t width, const int8_t* next = nullptr) {
  constexpr int kRows = kRegisters == 2 ? 5 : plain::kMost;  // beside the sums: the weights' sizes, ones, two for a row
  plain::each_some<kRows>(rows, [&]<int kN, bool kSoon>(int row, int turn, int turns) {
    plain::Ahead ahead(panel, next, in * kColumns, turn, turns);
    i16x sums[kN];
    each<kN>([&](auto r) { sums[r] = i16x{}; });
    for (int64_t k = 0; k < in; k += 4) {
      const int8_t *at = x + row * stride + k, *weights = panel + k * kColumns;
      const u16x sizes = without_signs(load_lanes(weights));
      if (kSoon) ahead.ask();
      each<kN>([&](auto r) {
        if (kRegisters == 2) asm("" : "+r"(weights));  // loaded anew: there is no register to keep them in
        const u16x pairs = multiply_bytes(sizes, with_signs(lanes_of(at + r * stride), load_lanes(weights)));
        add_to(sums[r], multiply_pairs(pairs, u16x{} + 0x00010001u));
      });
    }
    each<kN>([&](auto r) { store_lanes(c + (row + r) * width, (u16x)sums[r]); });
  });
}
