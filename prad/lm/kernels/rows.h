// What happens to each row on its own: norms, rotary positions, the largest logit.
#pragma once
#include <algorithm>

#include "pool.h"
#include "vec.h"

constexpr int64_t kRowsPerItem = 8, kMostHeadDim = 512;

template <class Body>
void each_row(Pool& pool, int64_t rows, const Body& body) {
  pool.run((rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    int64_t end = std::min(rows, (item + 1) * kRowsPerItem);
    for (int64_t row = item * kRowsPerItem; row < end; row++) body(row);
  });
}

template <class T>
void norm(Pool& pool, const NormCall& call, int64_t rows) {
  const int64_t width = call.width;
  const float *weight = call.weight, *bias = call.bias;
  each_row(pool, rows, [&](int64_t row) {
    const float* from = call.x + row * width;
    T* to = static_cast<T*>(call.out) + row * width;
    int64_t whole = width / 16 * 16;
    float middle = 0;
    if (call.center) {
      v16 total = {};
      for (int64_t i = 0; i < whole; i += 16) total += load(from + i);
      middle = sum(total);
      for (int64_t i = whole; i < width; i++) middle += from[i];
      middle /= width;
    }
    v16 squares = {};
    for (int64_t i = 0; i < whole; i += 16) {
      v16 d = load(from + i) - middle;
      squares += d * d;
    }
    float square = sum(squares);
    for (int64_t i = whole; i < width; i++) square += (from[i] - middle) * (from[i] - middle);
    float scale = 1.0f / std::sqrt(square / width + call.epsilon);
    for (int64_t i = 0; i < whole; i += 16) {
      v16 y = (load(from + i) - middle) * scale * load(weight + i);
      store(to + i, bias ? y + load(bias + i) : y);
    }
    for (int64_t i = whole; i < width; i++)
      to[i] = from_float<T>((from[i] - middle) * scale * weight[i] + (bias ? bias[i] : 0.0f));
  });
}

template <class T>
void rotate(Pool& pool, const RotateCall& call, int64_t rows) {
  const int64_t dim = call.dim;
  each_row(pool, rows, [&](int64_t row) {
    const float *c = call.cosine + row * dim, *s = call.sine + row * dim;
    float head[kMostHeadDim];
    for (int64_t h = 0; h < call.heads; h++) {
      T* at = static_cast<T*>(call.x) + row * call.stride + h * dim;
      for (int64_t i = 0; i < dim; i++) head[i] = to_float(at[i]);
      if (const float* weight = h < call.queries ? call.q_norm : call.k_norm) {
        float square = 0;
        for (int64_t i = 0; i < dim; i++) square += head[i] * head[i];
        float scale = 1.0f / std::sqrt(square / dim + call.epsilon);
        for (int64_t i = 0; i < dim; i++) head[i] *= scale * weight[i];
      }
      int64_t half = dim / 2;
      for (int64_t i = 0; i < half; i++) {
        at[i] = from_float<T>(head[i] * c[i] - head[i + half] * s[i]);
        at[i + half] = from_float<T>(head[i + half] * c[i + half] + head[i] * s[i + half]);
      }
    }
  });
}

template <class T>
void argmax(Pool& pool, const ArgmaxCall& call, int64_t rows) {
  const int64_t width = call.width;
  pool.run(rows, [&](int64_t row) {
    const T* at = static_cast<const T*>(call.x) + row * width;
    int64_t whole = width / 16 * 16;
    v16 best = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += 16) best = larger(load(at + i), best);
    float most = largest(best);
    for (int64_t i = whole; i < width; i++) most = std::max(most, to_float(at[i]));
    int64_t first = 0;  // of the sixteen that hold it
    while (first < whole && largest(load(at + first)) != most) first += 16;
    call.out[row] = 0;
    for (int64_t i = first; i < width; i++)
      if (to_float(at[i]) == most) {
        call.out[row] = i;
        break;
      }
  });
}
