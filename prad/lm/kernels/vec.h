// Sixteen floats at a time, and bfloat16. GCC's vector types, so that any CPU can run it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "operations.h"

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16x __attribute__((vector_size(32), aligned(2), may_alias));

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

// The lanes kFrom of a (0 to 15) and b (16 to 31).
template <int... kFrom>
inline v16 chosen(v16 a, v16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, i16x{kFrom...});
#endif
}
using Lanes = std::make_integer_sequence<int, 16>;

inline v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
inline v16 load(const bf16* p) {
#ifdef __AVX512F__  // GCC 12 makes two halves of the conversion below
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#endif
  u16x wide = __builtin_convertvector(*reinterpret_cast<const h16x*>(p), u16x) << 16;
  return (v16)wide;
}

// Up to 16 numbers, zeros behind them.
template <class T>
v16 load_some(const T* p, int64_t count) {
  if (count >= 16) return load(p);
  v16 some = {};
  for (int64_t i = 0; i < count; i++) some[i] = to_float(p[i]);
  return some;
}

inline void store(float* p, v16 x) { *reinterpret_cast<v16*>(p) = x; }
inline void store(bf16* p, v16 x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  return;
#endif
  u16x bits = (u16x)x;
  u16x rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u16x nan = (u16x)(x != x);
  rounded = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
  *reinterpret_cast<h16x*>(p) = __builtin_convertvector(rounded, h16x);
}

inline float sum(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float total = 0;
  for (int i = 0; i < 16; i++) total += x[i];
  return total;
}
inline float largest(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float most = x[0];
  for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
  return most;
}
inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// 2^x to about one unit in the last place (Cephes' coefficients); x below 128. What lies below -126 becomes 0.
inline v16 power_of_two(v16 x) {
#ifdef __AVX512F__
  v16 whole = (v16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  v16 whole = (x + 12582912.0f) - 12582912.0f;  // to the nearest integer
#endif
  v16 r = x - whole;
  v16 p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // NaN stays NaN
  return (v16)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)whole);
#endif
  v16 out = p * (v16)((__builtin_convertvector(whole, i16x) + 127) << 23);
  return x < -126.0f ? splat(0) : out;
}

constexpr float kLog2E = 1.44269504088896341f;
inline v16 exponential(v16 x) { return power_of_two(x * kLog2E); }

inline v16 sigmoid(v16 x) {
  v16 bounded = x > 80.0f ? splat(80) : (x < -80.0f ? splat(-80) : x);
  return 1.0f / (1.0f + exponential(-bounded));
}

template <Activation kind>
inline v16 activate(v16 x) {
  if constexpr (kind == Activation::silu) return x * sigmoid(x);
  // 0.5 x (1 + tanh u) = x sigmoid(2u)
  if constexpr (kind == Activation::gelu_tanh)
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (kind == Activation::relu) return x < 0.0f ? splat(0) : x;  // NaN stays NaN
  return x;
}
