// Sixteen floats at a time, and bfloat16. GCC's vector types, so that any CPU can run it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16x __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t b16x __attribute__((vector_size(16), aligned(1), may_alias));

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
  float total = 0;
  for (int i = 0; i < 16; i++) total += x[i];
  return total;
}
inline float largest(v16 x) {
  float most = x[0];
  for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
  return most;
}
inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// e^x to about one unit in the last place; x at most 88. What lies below -87 becomes 0.
inline v16 exponential(v16 x) {
  v16 scaled = x * 1.44269504088896341f;
  v16 rounded = (scaled + 12582912.0f) - 12582912.0f;  // to the nearest integer
  v16 r = x - rounded * 0.693359375f - rounded * -2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i16x power = (__builtin_convertvector(rounded, i16x) + 127) << 23;
  v16 out = p * (v16)power;
  return x < -87.0f ? splat(0) : out;
}

enum class Activation : int32_t { none = 0, silu = 1, gelu_tanh = 2, relu = 3 };

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
