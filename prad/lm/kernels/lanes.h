// Sixteen numbers at a time, whatever registers there are: v16 of floats, i16x and u16x of whole numbers; and each of
// their 32 bits as two numbers or four.
//
// A product and a sum are rounded once where `fused` and `add_product` say so, if the CPU can, and nowhere else
// (-ffp-contract=off): left to themselves compilers choose for each loop, and a row would have other bits beside another
// number of rows.
//
// With AVX-512 they are GCC's vectors of one register. Elsewhere a class of as many registers as they take: GCC keeps a
// vector that is wider than any register in memory, and compares it number by number.
#pragma once
#include <cstdint>
#include <utility>
#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int kRegisters = 1;  // that sixteen numbers take
#elif defined(__AVX2__)
constexpr int kRegisters = 2;
#else
constexpr int kRegisters = 4;
#endif
constexpr int kInRegister = 16 / kRegisters;

using Lanes = std::make_integer_sequence<int, 16>;

// body(0), body(1), ... of kN constants: what they index stays in registers.
template <int kN, class Body>
inline void each(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kN>{});
}

#ifdef __AVX512F__
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16x __attribute__((vector_size(32), aligned(2), may_alias));

inline v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
inline void store(float* p, v16 x) { *reinterpret_cast<v16*>(p) = x; }
inline i16x load(const int32_t* p) { return *reinterpret_cast<const i16x*>(p); }
inline u16x load_lanes(const void* p) { return *reinterpret_cast<const u16x*>(p); }
inline void store_lanes(void* p, u16x x) { *reinterpret_cast<u16x*>(p) = x; }
inline u16x load_halves(const void* p) { return __builtin_convertvector(*reinterpret_cast<const h16x*>(p), u16x); }
inline void store_halves(void* p, u16x x) { *reinterpret_cast<h16x*>(p) = __builtin_convertvector(x, h16x); }

typedef uint8_t q16x __attribute__((vector_size(16), aligned(1), may_alias));
inline i16x load_quarters(const void* p) {  // signed
  return (i16x)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline void store_quarters(void* p, u16x x) { *reinterpret_cast<q16x*>(p) = __builtin_convertvector(x, q16x); }

inline v16 to_floats(i16x x) { return __builtin_convertvector(x, v16); }
inline i16x to_whole(v16 x) { return __builtin_convertvector(x, i16x); }
inline v16 nearest(v16 x) {  // whole number, ties to even
  return (v16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class Mask, class V>
V choose(Mask mask, V yes, V no) {
  return mask ? yes : no;
}
inline v16 fused(v16 a, v16 b, v16 c) { return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline void add_product(v16& sum, v16 a, v16 b) { sum = fused(a, b, sum); }

// The lanes kFrom of a (0 to 15) and b (16 to 31).
template <int... kFrom>
inline v16 chosen(v16 a, v16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, i16x{kFrom...});
#endif
}

using Register = v16;  // one of floats
inline Register folded(v16 x) { return x; }
template <int... kFrom>
inline Register shuffled(Register a, Register b) {
  return chosen<kFrom...>(a, b);
}
#else

template <class E>
struct Sixteen {
  static constexpr int kWide = kInRegister;
  typedef E Part __attribute__((vector_size(4 * kWide)));
  typedef E Stored __attribute__((vector_size(4 * kWide), aligned(2), may_alias));  // as bfloat16 is
  Part of[kRegisters];

  Sixteen() = default;
  Sixteen(E x) : Sixteen(made([x](int) { return x - Part{}; })) {}
  template <class F>
  explicit Sixteen(Sixteen<F> bits) : Sixteen(made([&](int i) { return (Part)bits.of[i]; })) {}

  // part(i) for each register.
  template <class F>
  static Sixteen made(const F& part) {
    return made(part, std::make_integer_sequence<int, kRegisters>{});
  }
  static Sixteen read(const void* p) {
    return made([p](int i) { return static_cast<Part>(static_cast<const Stored*>(p)[i]); });
  }
  void write(void* p) const {
    for (int i = 0; i < kRegisters; i++) static_cast<Stored*>(p)[i] = of[i];
  }
  E operator[](int i) const { return of[i / kWide][i % kWide]; }

#define PRAD_OPERATOR(op)                                                            \
  friend Sixteen operator op(const Sixteen& a, const Sixteen& b) {                   \
    return made([&](int i) { return static_cast<Part>(a.of[i] op b.of[i]); });       \
  }                                                                                  \
  Sixteen& operator op##=(const Sixteen& b) { return *this = *this op b; }
  PRAD_OPERATOR(+)
  PRAD_OPERATOR(-)
  PRAD_OPERATOR(*)
  PRAD_OPERATOR(/)
  PRAD_OPERATOR(&)
  PRAD_OPERATOR(|)
#undef PRAD_OPERATOR
#define PRAD_COMPARISON(op)                                                                            \
  friend Sixteen<int32_t> operator op(const Sixteen& a, const Sixteen& b) {                            \
    return Sixteen<int32_t>::made([&](int i) { return (typename Sixteen<int32_t>::Part)(a.of[i] op b.of[i]); }); \
  }
  PRAD_COMPARISON(>)
  PRAD_COMPARISON(<)
  PRAD_COMPARISON(!=)
#undef PRAD_COMPARISON
  Sixteen operator-() const {
    return made([&](int i) { return -of[i]; });
  }
  Sixteen operator~() const {
    return made([&](int i) { return ~of[i]; });
  }
  Sixteen operator<<(int bits) const {
    return made([&](int i) { return of[i] << bits; });
  }
  Sixteen operator>>(int bits) const {
    return made([&](int i) { return of[i] >> bits; });
  }

 private:
  template <class F, int... i>
  static Sixteen made(const F& part, std::integer_sequence<int, i...>) {
    Sixteen all;
    ((all.of[i] = part(i)), ...);
    return all;
  }
};

using v16 = Sixteen<float>;
using i16x = Sixteen<int32_t>;
using u16x = Sixteen<uint32_t>;

inline v16 load(const float* p) { return v16::read(p); }
inline void store(float* p, v16 x) { x.write(p); }
inline i16x load(const int32_t* p) { return i16x::read(p); }
inline u16x load_lanes(const void* p) { return u16x::read(p); }
inline void store_lanes(void* p, u16x x) { x.write(p); }

typedef uint16_t HalfPart __attribute__((vector_size(2 * u16x::kWide), aligned(2), may_alias));
inline u16x load_halves(const void* p) {
  return u16x::made([p](int i) {
    const HalfPart* at = static_cast<const HalfPart*>(p) + i;
#ifdef __AVX2__  // GCC 12 makes two halves of the conversion
    return (u16x::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
    return __builtin_convertvector(*at, u16x::Part);
#endif
  });
}
inline void store_halves(void* p, u16x x) {
#ifdef __AVX2__
  const __m256i both = _mm256_packus_epi32((__m256i)x.of[0], (__m256i)x.of[1]);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
  return;
#endif
  for (int i = 0; i < kRegisters; i++) static_cast<HalfPart*>(p)[i] = __builtin_convertvector(x.of[i], HalfPart);
}
typedef uint8_t QuarterPart __attribute__((vector_size(u16x::kWide), aligned(1), may_alias));
inline void store_quarters(void* p, u16x x) {
#ifdef __AVX2__  // GCC 12 converts number by number
  const __m256i low = (__m256i)x.of[0], high = (__m256i)x.of[1];
  const __m128i mask = _mm_set1_epi16(255);
  __m128i a = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  __m128i b = _mm_packs_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  a = _mm_and_si128(a, mask), b = _mm_and_si128(b, mask);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(a, b));
#else
  for (int i = 0; i < kRegisters; i++) static_cast<QuarterPart*>(p)[i] = __builtin_convertvector(x.of[i], QuarterPart);
#endif
}

typedef int8_t SignedPart __attribute__((vector_size(u16x::kWide), aligned(1), may_alias));
inline i16x load_quarters(const void* p) {  // signed
  return i16x::made([p](int i) {
#ifdef __AVX2__
    const auto* at = reinterpret_cast<const __m128i*>(static_cast<const SignedPart*>(p) + i);
    return (i16x::Part)_mm256_cvtepi8_epi32(_mm_loadl_epi64(at));
#else
    return __builtin_convertvector(static_cast<const SignedPart*>(p)[i], i16x::Part);
#endif
  });
}

inline v16 to_floats(i16x x) {
  return v16::made([&](int i) { return __builtin_convertvector(x.of[i], v16::Part); });
}
inline i16x to_whole(v16 x) {
  return i16x::made([&](int i) { return __builtin_convertvector(x.of[i], i16x::Part); });
}
inline v16 nearest(v16 x) {  // whole number, ties to even
  return v16::made([&](int i) {
#ifdef __AVX2__
    return (v16::Part)_mm256_round_ps((__m256)x.of[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    v16::Part whole;
    for (int lane = 0; lane < v16::kWide; lane++) whole[lane] = __builtin_rintf(x.of[i][lane]);
    return whole;
#endif
  });
}
template <class E>
Sixteen<E> choose(i16x mask, Sixteen<E> yes, Sixteen<E> no) {
  return Sixteen<E>::made([&](int i) { return mask.of[i] ? yes.of[i] : no.of[i]; });
}
inline v16 fused(v16 a, v16 b, v16 c) {
  return v16::made([&](int i) {
#if defined(__AVX2__) && defined(__FMA__)
    return (v16::Part)_mm256_fmadd_ps((__m256)a.of[i], (__m256)b.of[i], (__m256)c.of[i]);
#elif defined(__FMA__)
    return (v16::Part)_mm_fmadd_ps((__m128)a.of[i], (__m128)b.of[i], (__m128)c.of[i]);
#elif defined(__aarch64__)
    return (v16::Part)vfmaq_f32((float32x4_t)c.of[i], (float32x4_t)a.of[i], (float32x4_t)b.of[i]);
#else
    return a.of[i] * b.of[i] + c.of[i];
#endif
  });
}

inline void add_product(v16& sum, v16 a, v16 b) {
#ifdef __FMA__  // as it stands: GCC would give every other sum a new register, and there are none
  each<kRegisters>([&](auto i) {
    v16::Part now = sum.of[i];
    asm("vfmadd231ps %2, %1, %0" : "+x"(now) : "x"(a.of[i]), "x"(b.of[i]));
    sum.of[i] = now;
  });
#else
  sum = fused(a, b, sum);
#endif
}

using Register = v16::Part;  // one of floats
inline void store(float* p, Register x) { *reinterpret_cast<v16::Stored*>(p) = x; }
// The sum of all registers.
inline Register folded(v16 x) {
  Register all = x.of[0];
  for (int i = 1; i < kRegisters; i++) all += x.of[i];
  return all;
}
// The lanes kFrom of a (from 0 on) and b (behind them).
template <int... kFrom>
inline Register shuffled(Register a, Register b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, i16x::Part{kFrom...});
#endif
}

// The lanes kFrom of a (0 to 15) and b (16 to 31); those of a register come from two at most.
template <int kTo, int... kFrom>
Register chosen_part(v16 a, v16 b) {
  constexpr int kWide = kInRegister, from[16] = {kFrom...};
  constexpr int first = from[kTo * kWide] / kWide;
  constexpr int second = [&] {
    for (int i = 0; i < kWide; i++)
      if (from[kTo * kWide + i] / kWide != first) return from[kTo * kWide + i] / kWide;
    return first;
  }();
  auto source = [&](int part) { return part < kRegisters ? a.of[part] : b.of[part - kRegisters]; };
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return shuffled<(from[kTo * kWide + i] / kWide == first ? 0 : kWide) + from[kTo * kWide + i] % kWide...>(
        source(first), source(second));
  }(std::make_integer_sequence<int, kWide>{});
}
template <int... kFrom>
v16 chosen(v16 a, v16 b) {
  return [&]<int... to>(std::integer_sequence<int, to...>) {
    v16 all;
    ((all.of[to] = chosen_part<to, kFrom...>(a, b)), ...);
    return all;
  }(std::make_integer_sequence<int, kRegisters>{});
}
#endif

// ---- 32 bits as two numbers or four

#ifdef __AVX512F__
using Whole = u16x;  // what one register holds
inline u16x each_register(u16x a, u16x b, const auto& body) { return body(a, b); }
#else
using Whole = u16x::Part;
inline u16x each_register(u16x a, u16x b, const auto& body) {
  return u16x::made([&](int i) { return (Whole)body(a.of[i], b.of[i]); });
}
#endif
typedef int16_t Shorts __attribute__((vector_size(sizeof(Whole))));
typedef int8_t Bytes __attribute__((vector_size(sizeof(Whole))));

// Of every two bytes the lower, or the upper, as a signed number of 16 bits.
inline u16x lower_bytes(u16x x) {
  return each_register(x, x, [](Whole a, Whole) { return (Whole)(((Shorts)a << 8) >> 8); });
}
inline u16x upper_bytes(u16x x) {
  return each_register(x, x, [](Whole a, Whole) { return (Whole)((Shorts)a >> 8); });
}
// sum += x, in numbers of 32 bits or of 16.
inline void add_to(i16x& sum, i16x x) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // as it stands, as add_product
  each<kRegisters>([&](auto i) {
    i16x::Part now = sum.of[i];
    asm("vpaddd %1, %0, %0" : "+x"(now) : "x"(x.of[i]));
    sum.of[i] = now;
  });
#else
  sum += x;
#endif
}
inline void add_pairs_to(u16x& sum, u16x x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  each<kRegisters>([&](auto i) {
    u16x::Part now = sum.of[i];
    asm("vpaddw %1, %0, %0" : "+x"(now) : "x"(x.of[i]));
    sum.of[i] = now;
  });
#else
  sum = each_register(sum, x, [](Whole a, Whole b) { return (Whole)((Shorts)a + (Shorts)b); });
#endif
}
// Of every two numbers of 16 bits: the sum of their products, in 32.
inline i16x multiply_pairs(u16x a, u16x b) {
  return (i16x)each_register(a, b, [](Whole x, Whole y) {
#if defined(__AVX512BW__)
    return (Whole)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Whole)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#else
    typedef int32_t Longs __attribute__((vector_size(sizeof(Whole))));
    return (Whole)((((Longs)x << 16) >> 16) * (((Longs)y << 16) >> 16) + ((Longs)x >> 16) * ((Longs)y >> 16));
#endif
  });
}
// Bytes without their signs; and negated where another is negative (where it is zero they may be anything).
inline u16x without_signs(u16x x) {
  return each_register(x, x, [](Whole a, Whole) {
#if defined(__AVX512BW__)
    return (Whole)_mm512_abs_epi8((__m512i)a);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Whole)_mm256_abs_epi8((__m256i)a);
#else
    const Bytes sign = (Bytes)a >> 7;
    return (Whole)(((Bytes)a ^ sign) - sign);
#endif
  });
}
inline u16x with_signs(u16x x, u16x other) {
  return each_register(x, other, [](Whole a, Whole b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Whole)_mm256_sign_epi8((__m256i)a, (__m256i)b);
#else
    const Bytes sign = (Bytes)b >> 7;
    return (Whole)(((Bytes)a ^ sign) - sign);
#endif
  });
}
// Of every two bytes, unsigned in a and signed in b: the sum of their products, in 16 bits, which must hold it.
inline u16x multiply_bytes(u16x a, u16x b) {
  return each_register(a, b, [](Whole x, Whole y) {
#if defined(__AVX512BW__)
    return (Whole)_mm512_maddubs_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Whole)_mm256_maddubs_epi16((__m256i)x, (__m256i)y);
#else
    return (Whole)(((Shorts)x & 255) * (((Shorts)y << 8) >> 8) + (((Shorts)x >> 8) & 255) * ((Shorts)y >> 8));
#endif
  });
}
