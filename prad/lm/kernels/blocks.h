// Weights in blocks, as ggml's files keep them: 32 inputs of a column share a scale. A panel of 16 columns holds, for each
// 32 inputs,
//   fours   [scale, least][16 columns] half, [4][16 columns][4 inputs][2] of 4 bits: scale * n + least    (Q4_0, Q4_1)
//   eights  [scale][16 columns] half, [8][16 columns][4 inputs] of 8 bits: scale * (n - 128)              (Q8_0)
// Rows are rounded to 8 bits, with a scale for as many inputs. A block's products are whole numbers, whose sum is exact;
// the blocks are added up in their order, whatever rows stand beside each other: the same bits alone and in any batch.
#pragma once
#include <algorithm>
#include <vector>

#include "plain.h"
#include "pool.h"
#include "rows.h"
#include "vec.h"

namespace blocks {
constexpr int64_t kInputs = 32, kVectors = kInputs / 4;
constexpr int64_t kAhead = 4096;  // bytes that are asked for before they are needed
constexpr int kMost = kRegisters == 1 ? 12 : 6;  // rows whose sums stay in registers

inline v16 halves(const char* at) {
#ifdef __AVX512F__
  return (v16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__) && defined(__AVX2__)
  return v16::made([at](int i) {
    return (v16::Part)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i));
  });
#else
  const u16x bits = load_halves(at);
  const v16 size = (v16)((bits & 0x7fffu) << 13) * 0x1p112f;  // the exponents' difference; no infinities here
  return (v16)((u16x)size | (bits & 0x8000u) << 16);
#endif
}

// Rows [rows, depth] in 8 bits. Of every 32: what one is worth, and what all of them are worth together.
struct Rows {
  const int8_t* x;
  const float *scales, *sums;  // [rows, depth / 32]
};

// 32 inputs; one that is not finite makes NaN of the scale.
inline void round_block(const bf16* from, int8_t* to, float& scale, float& sum) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  const v16 x[2] = {load(from), load(from + 16)};
  const u16x a = (u16x)x[0] & 0x7fffffffu, b = (u16x)x[1] & 0x7fffffffu, most = choose(a > b, a, b);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits = std::max(bits, most[i]);
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (bits >= kInfinity) {
    scale = sum = NAN;
    std::fill(to, to + kInputs, 0);
    return;
  }
  largest = std::max(largest, 0x1p-100f);
  scale = largest / 127;
  const v16 low = nearest(x[0] * (127 / largest)), high = nearest(x[1] * (127 / largest));
  store_quarters(to, (u16x)to_whole(low));
  store_quarters(to + 16, (u16x)to_whole(high));
  sum = scale * ::sum(low + high);  // of whole numbers: exact
}

// The memory is the caller's thread's, which gets the same for its next rows.
inline Rows round_rows(Pool& pool, const bf16* x, int64_t stride, int64_t rows, int64_t in) {
  thread_local std::vector<int8_t> bytes;
  thread_local std::vector<float> factors;
  const int64_t count = in / kInputs;
  bytes.resize(rows * in);
  factors.resize(2 * rows * count);
  int8_t* to = bytes.data();  // whichever thread rounds
  float *scales = factors.data(), *sums = scales + rows * count;
  each_row(pool, rows, [=](int64_t row) {
    for (int64_t i = 0; i < count; i++)
      round_block(x + row * stride + i * kInputs, to + row * in + i * kInputs, scales[row * count + i],
                  sums[row * count + i]);
  });
  return {to, scales, sums};
}

#ifdef __AVX512VNNI__
struct Sums {
  i16x all = {};
  void add(u16x numbers, u16x row) { all = (i16x)_mm512_dpbusd_epi32((__m512i)all, (__m512i)numbers, (__m512i)row); }
  i16x total() const { return all; }
};
using SmallSums = Sums;
#else
struct Sums {
  i16x all = {};
  void add(u16x numbers, u16x row) {
    add_to(all, multiply_pairs(numbers & 0x00ff00ffu, lower_bytes(row)));
    add_to(all, multiply_pairs(numbers >> 8 & 0x00ff00ffu, upper_bytes(row)));
  }
  i16x total() const { return all; }
};
struct SmallSums {  // of numbers of 4 bits: a block's, 8 times 2 * 15 * 127, fit into 16
  u16x pairs = {};
  void add(u16x numbers, u16x row) { add_pairs_to(pairs, multiply_bytes(numbers, row)); }
  i16x total() const { return multiply_pairs(pairs, u16x{} + 0x00010001u); }
};
#endif

// least: what is added to scale * n; numbers: those of four inputs in each column's lane, the i-th four.
struct Fours {
  using Sums = SmallSums;
  static constexpr int64_t kBytes = 64 + kInputs * kColumns / 2;
  static v16 least(const char* at, v16) { return halves(at + 32); }
  static u16x numbers(const char* at, int i) {
    const u16x both = load_lanes(at + 64 + 64 * (i / 2));
    return (i % 2 ? both >> 4 : both) & 0x0f0f0f0fu;
  }
};

struct Eights {
  using Sums = blocks::Sums;
  static constexpr int64_t kBytes = 32 + kInputs * kColumns;
  static v16 least(const char*, v16 scale) { return scale * -128.0f; }
  static u16x numbers(const char* at, int i) { return load_lanes(at + 32 + 64 * i); }
};

// kN rows by a panel of `count` blocks into c[kN][16]. ahead: the panel comes from memory.
template <class Form, int kN>
void multiply(const char* panel, int64_t count, const Rows& rows, int64_t row, bool ahead, float* c) {
  v16 sums[kN] = {};
  const int8_t* x = rows.x + row * count * kInputs;
  for (int64_t block = 0; block < count; block++, panel += Form::kBytes, x += kInputs) {
    if (ahead)
      for (int64_t line = 0; line < Form::kBytes; line += 64) __builtin_prefetch(panel + kAhead + line);
    typename Form::Sums whole[kN] = {};
    each<kVectors>([&](auto i) {
      const u16x numbers = Form::numbers(panel, i);
      each<kN>([&](auto r) { whole[r].add(numbers, lanes_of(x + r * count * kInputs + 4 * i)); });
    });
    const v16 scale = halves(panel), least = Form::least(panel, scale);
    each<kN>([&](auto r) {
      const int64_t at = (row + r) * count + block;
      sums[r] += fused(to_floats(whole[r].total()), scale * rows.scales[at], least * rows.sums[at]);
    });
  }
  each<kN>([&](auto r) { store(c + r * kColumns, sums[r]); });
}

template <class Form, int kN = kMost>
void multiply_some(int64_t n, const char* panel, int64_t count, const Rows& rows, int64_t row, bool first, float* c) {
  if constexpr (kN > 1)
    if (n < kN) return multiply_some<Form, kN - 1>(n, panel, count, rows, row, first, c);
  multiply<Form, kN>(panel, count, rows, row, first, c);
}

// y = x W^T; sink as linear.h's. panels: of the weights, in pairs that stay together.
template <class Form, class Sink>
void linear(Pool& pool, const char* weights, int64_t panels, int64_t in, const Rows& x, int64_t rows, const Sink& sink) {
  constexpr int64_t kRows = 60;  // five times those in registers
  const int64_t count = in / kInputs, block = rows <= kRows ? kRows : 4 * kRows;
  const int64_t step = rows <= kRows ? (panels / (4 * pool.threads()) + 2) / 2 * 2 : 24;
  const int64_t columns = (panels + step - 1) / step, blocks = (rows + block - 1) / block;
  pool.run(blocks * columns, [&](int64_t item) {
    const int64_t row = item / columns * block, end = std::min(rows, row + block);
    const int64_t from = item % columns * step, last = std::min(panels, from + step);
    alignas(64) float c[2][kRows * kColumns];
    for (int64_t p = from; p < last; p += 2) {
      const int beside = p + 1 < last ? 2 : 1;
      for (int64_t r = row; r < end; r += kRows) {
        const int64_t n = std::min(kRows, end - r), turns = (n + kMost - 1) / kMost, most = (n + turns - 1) / turns;
        for (int i = 0; i < beside; i++)
          for (int64_t some = 0; some < n; some += most)
            multiply_some<Form>(std::min(most, n - some), weights + (p + i) * count * Form::kBytes, count, x, r + some,
                                r + some == row, c[i] + some * kColumns);
        sink.take(p, r, static_cast<int>(n), c[0], beside == 2 ? c[1] : static_cast<float*>(nullptr));
      }
    }
  });
}
}  // namespace blocks
