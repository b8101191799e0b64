// Rows rounded to 8 bits, to be multiplied with 8-bit weights: value = (byte - zero) * scale, each row with a scale and
// a zero of its own, so that 0 to 255 are the range of its values.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "rows.h"
#include "vec.h"

struct ByteRows {
  const uint8_t* x;     // [rows, depth]
  const float* scales;  // [rows]
  const int32_t* zeros; // [rows]
};

inline void store_bytes(uint8_t* to, v16 x, int32_t zero) {  // to nearest, ties to even
#ifdef __AVX512F__
  __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_set1_epi32(zero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, __m512i{})));
#else
  for (int i = 0; i < 16; i++)
    to[i] = static_cast<uint8_t>(std::clamp(static_cast<int32_t>(__builtin_rintf(x[i])) + zero, 0, 255));
#endif
}

// One row; what lies between `in` and `depth` becomes its zero. A row with a value that is not finite gets NaN for a
// scale, one of nothing but the least numbers becomes zeros.
inline void round_row(const bf16* from, int64_t in, int64_t depth, uint8_t* to, float& scale, int32_t& zero) {
  constexpr float kLeast = 0x1p-100f;
  v16 most = {}, least = {};
  u16x spoilt = {};
  for (int64_t i = 0; i < in; i += 16) {
    v16 x = load_some(from + i, in - i);
    most = larger(x, most);
    least = larger(-x, least);
    spoilt |= (u16x)(((u16x)x & 0x7f800000u) == 0x7f800000u);
  }
  bool finite = true;
  for (int i = 0; i < 16; i++) finite = finite && !spoilt[i];
  float above = largest(most), below = largest(least);
  // each half: the largest numbers' sum may be none
  scale = std::max(above / 255 + below / 255, kLeast);
  zero = finite ? static_cast<int32_t>(__builtin_rintf(below / scale)) : 0;
  float steps = 1 / scale;
  for (int64_t i = 0; i < depth; i += 16)
    store_bytes(to + i, finite ? load_some(from + i, in - i) * steps : v16{}, zero);
  if (!finite) scale = NAN;
}

// Whoever asks next gets the same memory again.
inline ByteRows round_rows(Pool& pool, const bf16* x, int64_t stride, int64_t rows, int64_t in, int64_t depth) {
  thread_local std::vector<uint8_t> bytes;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> zeros;
  bytes.resize(rows * depth);
  scales.resize(rows);
  zeros.resize(rows);
  uint8_t* to = bytes.data();  // not this thread's alone
  float* scale = scales.data();
  int32_t* zero = zeros.data();
  each_row(pool, rows, [=](int64_t row) { round_row(x + row * stride, in, depth, to + row * depth, scale[row], zero[row]); });
  return {to, scale, zero};
}
