// Rows rounded to 8 bits, to be multiplied with 8-bit weights: value = (byte - 128) * scale, a scale for each row.
//
// A few inputs of a model are many times as large as the others, and would leave them a handful of steps. So every 64
// inputs are turned by a Hadamard matrix first, which spreads each over all 64, and so are the weights (weights.py);
// the matrix is orthogonal, so that their product is what it was.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "rows.h"
#include "vec.h"

constexpr int64_t kTurned = 64;

struct ByteRows {
  const uint8_t* x;     // [rows, depth]
  const float* scales;  // [rows]
};

// Sums and differences of the numbers kDistance apart.
template <int kDistance, int... i>
inline v16 butterfly(v16 x, std::integer_sequence<int, i...>) {
  static constexpr float kSigns[16] = {(i & kDistance ? -1.0f : 1.0f)...};
  return fused(load(kSigns), x, moved<kDistance>(x));
}
template <int kDistance>
inline v16 butterfly(v16 x) {
  return butterfly<kDistance>(x, Lanes{});
}

// 64 numbers times the Hadamard matrix of ones and minus ones.
inline void turn(v16* x) {
  for (int i = 0; i < 4; i++) x[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x[i]))));
  v16 a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}

inline void store_bytes(uint8_t* to, v16 x) {  // to nearest, ties to even
#ifdef __AVX512F__
  __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
#else
  store_quarters(to, (u16x)(to_whole(nearest(x)) + 128));
#endif
}

// One row, as if there were zeros between `in` and `depth`. A row with a value that is not finite, or whose sums are
// not, gets NaN for a scale; one of nothing but the least numbers becomes zeros.
inline void round_row(const bf16* from, int64_t in, int64_t depth, float* room, uint8_t* to, float& scale) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  u16x most = {};
  for (int64_t i = 0; i < depth; i += kTurned) {
    v16 x[4];
    if (i + kTurned <= in)
      for (int j = 0; j < 4; j++) x[j] = load(from + i + 16 * j);
    else
      for (int j = 0; j < 4; j++) x[j] = load_some(from + i + 16 * j, in - i - 16 * j);
    turn(x);
    for (int j = 0; j < 4; j++) {
      u16x bits = (u16x)x[j] & 0x7fffffffu;  // of magnitudes, which they order; NaN above infinity
      most = choose(bits > most, bits, most);
      store(room + i + 16 * j, x[j]);
    }
  }
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits = std::max(bits, most[i]);
  if (bits >= kInfinity) {
    scale = NAN;
    std::fill(to, to + depth, 128);
    return;
  }
  float largest;
  std::memcpy(&largest, &bits, 4);
  largest = std::max(largest, 0x1p-100f);
  scale = largest / 127;
  for (int64_t i = 0; i < depth; i += 16) store_bytes(to + i, load(room + i) * (127 / largest));
}

// The memory is the caller's thread's, which gets the same for its next rows.
inline ByteRows round_rows(Pool& pool, const bf16* x, int64_t stride, int64_t rows, int64_t in, int64_t depth) {
  thread_local std::vector<uint8_t> bytes;
  thread_local std::vector<float> scales;
  bytes.resize(rows * depth);
  scales.resize(rows);
  uint8_t* to = bytes.data();  // whichever thread rounds
  float* scale = scales.data();
  each_row(pool, rows, [=](int64_t row) {
    thread_local std::vector<float> room;
    room.resize(depth);
    round_row(x + row * stride, in, depth, room.data(), to + row * depth, scale[row]);
  });
  return {to, scale};
}
