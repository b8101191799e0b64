// What a machine can do at most: products of what is in registers already, and a read of memory, by all of its cores.
// Built for the machine at hand by limits.py; the fastest instructions that the compiler was told of.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "amx.h"

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 16;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
constexpr int kTurns = 2048;  // between two looks at the clock: some ten microseconds

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));  // where GCC would copy long ones to and fro
typedef uint64_t Words __attribute__((vector_size(kBytes), aligned(8), may_alias));

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Makes the compiler believe that somebody else reads and changes it.
template <class T>
void touch(T& x) {
  asm volatile("" : "+m"(x) : : "memory");
}

// `work` on so many threads, which begin together; the seconds of the last one.
template <class Work>
double together(int threads, Work work) {
  std::atomic<int> ready{0};
  std::vector<double> began(threads), ended(threads);
  auto one = [&](int thread) {
    ready++;
    while (ready < threads) std::this_thread::yield();
    began[thread] = now();
    work(thread);
    ended[thread] = now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(one, thread);
  one(0);
  for (std::thread& other : others) other.join();
  double first = began[0], last = ended[0];
  for (int thread = 1; thread < threads; thread++) {
    first = began[thread] < first ? began[thread] : first;
    last = ended[thread] > last ? ended[thread] : last;
  }
  return last - first;
}

// Operations (two for a product that is added) of one turn of each loop, in sums that do not wait for each other.

double float32_turns() {
  Floats factor = Floats{} + 0.5f, summand = Floats{} + 1.0f, sums[kSums] = {};
  touch(factor);
  touch(summand);
  for (int turn = 0; turn < kTurns; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[i] = sums[i] * factor + summand;
  touch(sums);
  return 2.0 * kTurns * kSums * (kBytes / 4);
}

#ifdef PRAD_AMX
template <bool kHalf>
double tile_turns() {  // four sums of 16 x 16, each by 64 bytes of k
  amx::configure_tiles(0, 0);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int turn = 0; turn < kTurns; turn++) {
    if constexpr (kHalf) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_release();
  return 2.0 * kTurns * 4 * 16 * 16 * (kHalf ? 32 : 64);
}
#endif

#ifdef __AVX512BF16__
double bf16_turns() {
  __m512 sums[kSums] = {};
  __m512bh rows = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1)), weights = rows;
  touch(rows);
  touch(weights);
  for (int turn = 0; turn < kTurns; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[i] = _mm512_dpbf16_ps(sums[i], rows, weights);
  touch(sums);
  return 2.0 * kTurns * kSums * 32;
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
double int8_turns() {
  Ints sums[kSums] = {};
  __m512i rows = _mm512_set1_epi8(1), weights = rows;
  touch(rows);
  touch(weights);
  for (int turn = 0; turn < kTurns; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[i] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[i], rows, weights);
  touch(sums);
  return 2.0 * kTurns * kSums * 64;
}
#elif defined(__AVXVNNI__)
double int8_turns() {
  Ints sums[kSums] = {};
  __m256i rows = _mm256_set1_epi8(1), weights = rows;
  touch(rows);
  touch(weights);
  for (int turn = 0; turn < kTurns; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[i] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums[i], rows, weights);
  touch(sums);
  return 2.0 * kTurns * kSums * 32;
}
#elif defined(__AVX2__)
double int8_turns() {  // no one instruction does it: pairs to 16 bits, pairs of these to 32, added
  constexpr int kFew = 8;  // the sums wait for additions only, and the products want registers, too
  __m256i sums[kFew] = {}, rows = _mm256_set1_epi8(1), weights = rows;
  const __m256i ones = _mm256_set1_epi16(1);
  touch(rows);
  for (int turn = 0; turn < kTurns; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < kFew; i++) {
      asm volatile("" : "+x"(weights));  // else the product would be computed once
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(rows, weights), ones));
    }
  touch(sums);
  return 2.0 * kTurns * kFew * 32;
}
#endif

enum Products { kFloat32, kBf16, kInt8 };

struct Loop {
  const char* by;
  double (*turns)();
};

Loop chosen(int products) {
  switch (products) {
    case kFloat32:
#if defined(__AVX512F__)
      return {"AVX-512 FMA", float32_turns};
#elif defined(__FMA__)
      return {"AVX2 FMA", float32_turns};
#else
      return {"vectors of 16 bytes", float32_turns};
#endif
    case kBf16:
#ifdef PRAD_AMX
      if (allow_amx()) return {"AMX tiles", tile_turns<true>};
#endif
#ifdef __AVX512BF16__
      return {"AVX-512 BF16 dot products", bf16_turns};
#endif
      break;
    case kInt8:
#ifdef PRAD_AMX
      if (allow_amx()) return {"AMX tiles", tile_turns<false>};
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
      return {"AVX-512 VNNI dot products", int8_turns};
#elif defined(__AVXVNNI__)
      return {"AVX VNNI dot products", int8_turns};
#elif defined(__AVX2__)
      return {"AVX2 maddubs, madd and add", int8_turns};
#endif
      break;
  }
  return {"", nullptr};
}

}  // namespace

extern "C" {

// What multiplies; empty where this CPU has nothing for such products.
const char* limits_by(int products) { return chosen(products).by; }

// Operations a second of all threads together, over some `seconds`.
double limits_rate(int products, int threads, double seconds) {
  const Loop loop = chosen(products);
  std::vector<double> rates(threads);
  together(threads, [&](int thread) {
    double began = now(), took = 0, done = 0;
    while (took < seconds) {
      done += loop.turns();
      took = now() - began;
    }
    rates[thread] = done / took;
  });
  double all = 0;
  for (double rate : rates) all += rate;
  return all;
}

// Seconds of one read of `bytes`, in which each thread has a part of its own.
double limits_read(const char* memory, int64_t bytes, int threads) {
  constexpr int64_t kStep = 8 * kBytes;
  const int64_t part = bytes / threads / kStep * kStep;
  return together(threads, [&](int thread) {
    Words seen[8] = {};
    const char *at = memory + thread * part, *end = at + part;
    for (; at < end; at += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        if (i * kBytes % 64 == 0) __builtin_prefetch(at + i * kBytes + 1024);
        seen[i] |= *reinterpret_cast<const Words*>(at + i * kBytes);
      }
    }
    touch(seen);
  });
}

}  // extern "C"
