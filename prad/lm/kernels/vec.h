// Functions of sixteen floats at a time (lanes.h), and bfloat16.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "lanes.h"
#include "operations.h"

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline v16 splat(float x) { return x - v16{}; }

inline v16 load(const bf16* p) {
#ifdef __AVX512F__  // GCC 12 makes two halves of the conversion below
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#endif
  return (v16)(load_halves(p) << 16);
}

// Of sixteen pairs the first numbers, or the second. kInside: what lies before the pairs may be read as well: then one
// instruction is enough, where shifting takes two.
inline v16 second_of_pairs(const bf16* p) { return (v16)(load_lanes(p) & 0xffff0000u); }
template <bool kInside>
inline v16 first_of_pairs(const bf16* p) {
  if constexpr (kInside && kRegisters == 2) return second_of_pairs(p - 1);
  return (v16)(load_lanes(p) << 16);
}

// Up to 16 numbers, zeros behind them.
template <class T>
v16 load_some(const T* p, int64_t count) {
  if (count >= 16) return load(p);
  float some[16] = {};
  for (int64_t i = 0; i < count; i++) some[i] = to_float(p[i]);
  return load(some);
}

inline void store(bf16* p, v16 x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  return;
#endif
  u16x bits = (u16x)x;
  u16x rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u16x nan = (u16x)(x != x);
  rounded = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
  store_halves(p, rounded);
}

// The lanes of x, each with the one kDistance further on.
template <int kDistance, int... i>
inline v16 moved(v16 x, std::integer_sequence<int, i...>) {
  return chosen<(i ^ kDistance)...>(x, x);
}
template <int kDistance>
inline v16 moved(v16 x) {
  return moved<kDistance>(x, Lanes{});
}

inline v16 larger(v16 a, v16 b) { return choose(a > b, a, b); }

inline float sum(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#endif
  x += moved<8>(x);
  x += moved<4>(x);
  x += moved<2>(x);
  return x[0] + x[1];
}
inline float largest(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#endif
  x = larger(x, moved<8>(x));
  x = larger(x, moved<4>(x));
  x = larger(x, moved<2>(x));
  return x[0] > x[1] ? x[0] : x[1];
}

// 2^x to about one unit in the last place (Cephes' coefficients); x below 128. What lies below -126 becomes 0.
inline v16 power_of_two(v16 x) {
  v16 whole = nearest(x);
  v16 r = x - whole;
  v16 p = splat(1.535336188319500e-4f);
  p = fused(p, r, splat(1.339887440266574e-3f));
  p = fused(p, r, splat(9.618437357674640e-3f));
  p = fused(p, r, splat(5.550332471162809e-2f));
  p = fused(p, r, splat(2.402264791363012e-1f));
  p = fused(p, r, splat(6.931472028550421e-1f));
  p = fused(p, r, splat(1));
#ifdef __AVX512F__
  __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // NaN stays NaN
  return (v16)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)whole);
#endif
  v16 out = p * (v16)((to_whole(whole) + 127) << 23);
  return choose(x < -126.0f, splat(0), out);
}

constexpr float kLog2E = 1.44269504088896341f;
inline v16 exponential(v16 x) { return power_of_two(x * kLog2E); }

inline v16 sigmoid(v16 x) {
  v16 bounded = choose(x > 80.0f, splat(80), choose(x < -80.0f, splat(-80), x));
  return 1.0f / (1.0f + exponential(-bounded));
}

template <Activation kind>
inline v16 activate(v16 x) {
  if constexpr (kind == Activation::silu) return x * sigmoid(x);
  // 0.5 x (1 + tanh u) = x sigmoid(2u)
  if constexpr (kind == Activation::gelu_tanh)
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (kind == Activation::relu) return choose(x < 0.0f, splat(0), x);  // NaN stays NaN
  return x;
}
