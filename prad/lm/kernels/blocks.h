// Weights in blocks, as ggml's files keep them. A panel of 16 columns holds, for each 32 inputs,
//   fours    [scale, least][16 columns] half, [4][16 columns][4 inputs][2] of 4 bits: scale * n + least    (Q4_0, Q4_1)
//   eights   [scale][16 columns] half, [8][16 columns][4 inputs] of 8 bits: scale * (n - 128)              (Q8_0)
// or, in front of each 256 inputs, scale and least that they share, as above, and for each 32 of them
//   k_fours  [scale, least][16 columns] steps, 8 bits: how many times these; numbers as of fours           (Q4_K)
//   k_sixes  [2][16 columns] steps of 16 inputs each, [4][16 columns][4 inputs][2] of 4 bits and, above them,
//            [2][16 columns][4 inputs][4] of 2: scale * step * (n - 32)                                    (Q6_K)
// Rows are rounded to 8 bits, with a scale for every 32 inputs. The products of numbers that share a scale are whole
// numbers, whose sum is exact; these sums are added up in their order, whatever rows stand beside each other: the same
// bits alone and in any batch.
#pragma once
#include <algorithm>
#include <vector>

#include "plain.h"
#include "pool.h"
#include "rows.h"
#include "vec.h"

namespace blocks {
constexpr int64_t kInputs = 32, kVectors = kInputs / 4;
constexpr int64_t kTogether = 8;  // blocks that share something
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

// Rows [rows, depth] in 8 bits. Of every 32: what one is worth, and what all of them are worth together, and each half.
struct Rows {
  const int8_t* x;
  const float *scales, *sums, *half_sums;  // [rows, depth / 32], and [rows, depth / 16]
};

// 32 inputs; one that is not finite makes NaN of the scale.
inline void round_block(const bf16* from, int8_t* to, float& scale, float& sum, float* half_sums) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  const v16 x[2] = {load(from), load(from + 16)};
  const u16x a = (u16x)x[0] & 0x7fffffffu, b = (u16x)x[1] & 0x7fffffffu, most = choose(a > b, a, b);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits = std::max(bits, most[i]);
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (bits >= kInfinity) {
    scale = sum = half_sums[0] = half_sums[1] = NAN;
    std::fill(to, to + kInputs, 0);
    return;
  }
  largest = std::max(largest, 0x1p-100f);
  scale = largest / 127;
  const v16 low = nearest(x[0] * (127 / largest)), high = nearest(x[1] * (127 / largest));
  store_quarters(to, (u16x)to_whole(low));
  store_quarters(to + 16, (u16x)to_whole(high));
  const float first = ::sum(low), second = ::sum(high);  // of whole numbers: exact
  sum = scale * (first + second), half_sums[0] = scale * first, half_sums[1] = scale * second;
}

// The memory is the caller's thread's, which gets the same for its next rows.
inline Rows round_rows(Pool& pool, const bf16* x, int64_t stride, int64_t rows, int64_t in) {
  thread_local std::vector<int8_t> bytes;
  thread_local std::vector<float> factors;
  const int64_t count = in / kInputs;
  bytes.resize(rows * in);
  factors.resize(4 * rows * count);
  int8_t* to = bytes.data();  // whichever thread rounds
  float *scales = factors.data(), *sums = scales + rows * count, *half_sums = sums + rows * count;
  each_row(pool, rows, [=](int64_t row) {
    for (int64_t i = 0, at = row * count; i < count; i++, at++)
      round_block(x + row * stride + i * kInputs, to + at * kInputs, scales[at], sums[at], half_sums + 2 * at);
  });
  return {to, scales, sums, half_sums};
}

#ifdef __AVX512VNNI__
struct Sums {
  i16x all = {};
  void add(u16x numbers, u16x row) { all = (i16x)_mm512_dpbusd_epi32((__m512i)all, (__m512i)numbers, (__m512i)row); }
  i16x total() const { return all; }
};
using SmallSums = Sums;
using SevenBitSums = Sums;
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
struct SevenBitSums {  // 2 * 127 * 127 fits into 16
  i16x all = {};
  void add(u16x numbers, u16x row) {
    add_to(all, multiply_pairs(multiply_bytes(numbers, row), u16x{} + 0x00010001u));
  }
  i16x total() const { return all; }
};
#endif

// What is done with a number of 4 to 8 bits.
struct Factors {
  v16 scale, least;  // scale * n + least
};

// A form's blocks take kBytes, behind kHead bytes that kTogether of them share, and have a scale for each of kParts. One
// block lies at `at`; numbers: those of four inputs in each column's lane, the i-th four.
struct Plain {
  static constexpr int64_t kHead = 0;
  static constexpr int kParts = 1;
};

struct Fours : Plain {
  using Sums = SmallSums;
  static constexpr int64_t kBytes = 64 + kInputs * kColumns / 2;
  static Factors factors(const char*, const char* at, int) { return {halves(at), halves(at + 32)}; }
  static u16x numbers(const char* at, int i) { return of_four_bits(at + 64, i); }
  static u16x of_four_bits(const char* at, int i) {
    const u16x both = load_lanes(at + 64 * (i / 2));
    return (i % 2 ? both >> 4 : both) & 0x0f0f0f0fu;
  }
};

struct Eights : Plain {
  using Sums = blocks::Sums;
  static constexpr int64_t kBytes = 32 + kInputs * kColumns;
  static Factors factors(const char*, const char* at, int) {
    const v16 scale = halves(at);
    return {scale, scale * -128.0f};
  }
  static u16x numbers(const char* at, int i) { return load_lanes(at + 32 + 64 * i); }
};

inline v16 steps(const char* at) { return to_floats(load_quarters(at)); }

struct KFours {
  using Sums = SmallSums;
  static constexpr int64_t kHead = 64, kBytes = 32 + kInputs * kColumns / 2;
  static constexpr int kParts = 1;
  static Factors factors(const char* head, const char* at, int) {
    return {halves(head) * steps(at), halves(head + 32) * steps(at + 16)};
  }
  static u16x numbers(const char* at, int i) { return Fours::of_four_bits(at + 32, i); }
};

struct KSixes {
  using Sums = SevenBitSums;
  static constexpr int64_t kHead = 32, kBytes = 32 + kInputs * kColumns * 3 / 4;
  static constexpr int kParts = 2;
  static Factors factors(const char* head, const char* at, int part) {
    const v16 scale = halves(head) * steps(at + 16 * part);
    return {scale, scale * -32.0f};
  }
  static u16x numbers(const char* at, int i) {
    const u16x four = load_lanes(at + 32 + kInputs * kColumns / 2 + 64 * (i / 4));
    const u16x high = i % 4 < 2 ? four << (4 - i % 4 * 2) : four >> (i % 4 * 2 - 4);
    return Fours::of_four_bits(at + 32, i) | (high & 0x30303030u);
  }
};

// body(form) for weights in blocks.
template <class Body>
auto with_form(Weights kind, const Body& body) {
  switch (kind) {
    case Weights::eights:
      return body(Eights{});
    case Weights::k_fours:
      return body(KFours{});
    case Weights::k_sixes:
      return body(KSixes{});
    default:
      return body(Fours{});
  }
}

// kN rows by a panel of `count` blocks into c[kN][16]. ahead: the panel comes from memory.
template <class Form, int kN>
__attribute__((flatten)) void multiply(const char* panel, int64_t count, const Rows& rows, int64_t row, bool ahead,
                                       float* c) {
  constexpr int kParts = Form::kParts;
  v16 sums[kN];
  each<kN>([&](auto r) { sums[r] = v16{}; });
  const int8_t* x = rows.x + row * count * kInputs;
  const float* row_sums = kParts == 1 ? rows.sums : rows.half_sums;
  const char* head = panel;
  for (int64_t block = 0; block < count; block++, panel += Form::kBytes, x += kInputs) {
    if (Form::kHead && block % kTogether == 0) head = panel, panel += Form::kHead;
    if (ahead)
      for (int64_t line = 0; line < Form::kBytes; line += 64) __builtin_prefetch(panel + kAhead + line);
    each<kParts>([&](auto part) {
      typename Form::Sums whole[kN];
      each<kN>([&](auto r) { whole[r] = typename Form::Sums{}; });
      each<kVectors / kParts>([&](auto j) {
        constexpr int i = part * kVectors / kParts + j;
        const u16x numbers = Form::numbers(panel, i);
        each<kN>([&](auto r) { whole[r].add(numbers, lanes_of(x + r * count * kInputs + 4 * i)); });
      });
      const Factors own = Form::factors(head, panel, part);
      each<kN>([&](auto r) {
        const int64_t at = (row + r) * count + block;
        sums[r] += fused(to_floats(whole[r].total()), own.scale * rows.scales[at],
                         own.least * row_sums[at * kParts + part]);
      });
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

// The panels of a layer's weights, which are `count` blocks deep.
struct Panels {
  const Linear& w;
  int64_t count;

  Weights kind(int64_t panel) const {
    return w.weights == Weights::mixed ? static_cast<Weights>(w.places[2 * panel + 1]) : w.weights;
  }
  const char* operator[](int64_t panel) const {
    const int64_t size = with_form(w.weights, [this](auto form) {
      return count * form.kBytes + count / kTogether * form.kHead;
    });
    return static_cast<const char*>(w.panels) + (w.weights == Weights::mixed ? w.places[2 * panel] : panel * size);
  }
};

// y = x W^T; sink as linear.h's. panels: how many, in pairs that stay together.
template <class Sink>
void linear(Pool& pool, const Linear& w, int64_t panels, const Rows& x, int64_t rows, const Sink& sink) {
  constexpr int64_t kRows = 60;  // five times those in registers
  const Panels weights{w, w.in_features / kInputs};
  const int64_t block = rows <= kRows ? kRows : 4 * kRows;
  const int64_t blocks = (rows + block - 1) / block, step = panels_of_item(panels, blocks, pool.threads());
  const int64_t columns = (panels + step - 1) / step;
  pool.run(blocks * columns, [&](int64_t item) {
    const int64_t row = item / columns * block, end = std::min(rows, row + block);
    const int64_t from = item % columns * step, last = std::min(panels, from + step);
    alignas(64) float c[2][kRows * kColumns];
    for (int64_t p = from; p < last; p += 2) {
      const int beside = p + 1 < last ? 2 : 1;
      for (int64_t r = row; r < end; r += kRows) {
        const int64_t n = std::min(kRows, end - r), turns = (n + kMost - 1) / kMost, most = (n + turns - 1) / turns;
        for (int i = 0; i < beside; i++) {
          sink.expect(p + i, r, static_cast<int>(n));
          with_form(weights.kind(p + i), [&](auto form) {
            for (int64_t some = 0; some < n; some += most)
              multiply_some<decltype(form)>(std::min(most, n - some), weights[p + i], weights.count, x, r + some,
                                            r + some == row, c[i] + some * kColumns);
          });
        }
        sink.take(p, r, static_cast<int>(n), c[0], beside == 2 ? c[1] : static_cast<float*>(nullptr));
      }
    }
  });
}
}  // namespace blocks
