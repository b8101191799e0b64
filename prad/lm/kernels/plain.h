// Products of rows and packed weights (linear.h) in vectors of 16 columns, on any CPU.
#pragma once
#include <algorithm>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "vec.h"

constexpr int kColumns = 16;

// ---- any number of rows by one panel into c[rows][16], or added to it; `width` from row to row of c

template <bool kAdd = false>
void multiply_plain(const float* x, int64_t stride, int rows, const float* panel, int64_t in, float* c,
                    int64_t width = kColumns) {
  for (int first = 0; first < rows; first += 8) {
    int count = std::min(8, rows - first);
    v16 acc[8] = {};
    for (int r = 0; kAdd && r < count; r++) acc[r] = load(c + (first + r) * width);
    for (int64_t k = 0; k < in; k++) {
      v16 w = load(panel + k * kColumns);
      for (int r = 0; r < count; r++) acc[r] += x[(first + r) * stride + k] * w;
    }
    for (int r = 0; r < count; r++) store(c + (first + r) * width, acc[r]);
  }
}

template <bool kAdd = false>
void multiply_plain(const bf16* x, int64_t stride, int rows, const bf16* panel, int64_t in, float* c,
                    int64_t width = kColumns) {
  for (int first = 0; first < rows; first += 8) {
    int count = std::min(8, rows - first);
    v16 acc[8] = {};
    for (int r = 0; kAdd && r < count; r++) acc[r] = load(c + (first + r) * width);
    for (int64_t k = 0; k < in; k += 2) {
      u16x both = *reinterpret_cast<const u16x*>(panel + k * kColumns);
      u16x low = both << 16, high = both & 0xffff0000u;
      for (int r = 0; r < count; r++) {
        const bf16* at = x + (first + r) * stride + k;
        acc[r] += to_float(at[0]) * (v16)low + to_float(at[1]) * (v16)high;
      }
    }
    for (int r = 0; r < count; r++) store(c + (first + r) * width, acc[r]);
  }
}

// Four inputs of 16 columns in 8 bits, made wider once for several rows.
#ifdef __AVX2__
struct Quad {
  __m256i even[2], odd[2];  // inputs 0 and 2 of each column, inputs 1 and 3

  explicit Quad(const int8_t* at) {
    for (int half = 0; half < 2; half++) {
      __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half));
      even[half] = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
      odd[half] = _mm256_srai_epi16(all, 8);
    }
  }
  struct Sums {
    __m256i of[2] = {};
    void store(int32_t* to) const {
      for (int half = 0; half < 2; half++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * half), of[half]);
    }
  };
  void add(Sums& sums, uint32_t row) const {
    __m256i x_even = _mm256_set1_epi32(row & 0x00ff00ffu), x_odd = _mm256_set1_epi32((row >> 8) & 0x00ff00ffu);
    for (int half = 0; half < 2; half++) {
      __m256i both = _mm256_add_epi32(_mm256_madd_epi16(x_even, even[half]), _mm256_madd_epi16(x_odd, odd[half]));
      sums.of[half] = _mm256_add_epi32(sums.of[half], both);
    }
  }
};
#else
struct Quad {
  i16x input[4];

  explicit Quad(const int8_t* at) {
    for (int i = 0; i < 4; i++)
      for (int column = 0; column < kColumns; column++) input[i][column] = at[column * 4 + i];
  }
  struct Sums {
    i16x of = {};
    void store(int32_t* to) const { *reinterpret_cast<i16x*>(to) = of; }
  };
  void add(Sums& sums, uint32_t row) const {
    for (int i = 0; i < 4; i++) sums.of += static_cast<int32_t>((row >> (8 * i)) & 0xff) * input[i];
  }
};
#endif

inline void multiply_plain(const uint8_t* x, int64_t stride, int rows, const int8_t* panel, int64_t in, int32_t* c,
                           int64_t width = kColumns) {
  for (int first = 0; first < rows; first += 4) {
    int count = std::min(4, rows - first);
    Quad::Sums sums[4];
    for (int64_t k = 0; k < in; k += 4) {
      Quad weights(panel + k * kColumns);
      for (int r = 0; r < count; r++) {
        uint32_t row;
        std::memcpy(&row, x + (first + r) * stride + k, 4);
        weights.add(sums[r], row);
      }
    }
    for (int r = 0; r < count; r++) sums[r].store(c + (first + r) * width);
  }
}
