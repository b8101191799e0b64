// One decode step's attention: each sequence stores its new key and value in its blocks and attends over them.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

struct Paged {
  const void *query, *key, *value;  // [sequences, heads, dim] with a stride per sequence, in elements
  int64_t query_stride, key_stride, value_stride;
  void *keys, *values;  // [blocks, block_size, kv_heads, dim]
  const int64_t* table;  // [sequences, width] block numbers
  const int64_t* lengths;  // [sequences] tokens in the cache, the new one included
  void* out;  // [sequences, heads, value_dim]
  int64_t sequences, width, heads, kv_heads, key_dim, value_dim, block_size;
  int64_t window;  // latest tokens seen, 0: all
  float scale;
};

// Lane i of the result is the sum over x[i].
inline v16 sum_each(v16* x) {
  constexpr i16x first[4] = {{0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31},
                             {0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31},
                             {0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31},
                             {0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31}};
  constexpr i16x second[4] = {{1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30},
                              {2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29},
                              {4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27},
                              {8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}};
#pragma GCC unroll 4
  for (int level = 0; level < 4; level++)
#pragma GCC unroll 8
    for (int i = 0; i < 8 >> level; i++)
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], first[level]) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], second[level]);
  return x[0];
}

// One KV head of a sequence's tokens in a pool.
template <class T>
struct Tokens {
  T* pool;
  const int64_t* table;
  int64_t block_size, stride;

  T* at(int64_t token) const {
    return pool + (table[token / block_size] * block_size + token % block_size) * stride;
  }

  // body(first token, its place, count) for every stretch of at most 16 tokens that lie side by side
  template <class Body>
  void each_stretch(int64_t start, int64_t end, const Body& body) const {
    for (int64_t t = start; t < end;) {
      int64_t next = std::min(end, (t / block_size + 1) * block_size);
      for (const T* place = at(t); t < next; t += 16, place += 16 * stride)
        body(t, place, static_cast<int>(std::min<int64_t>(16, next - t)));
      t = next;
    }
  }
};

// Queries [kQueries][dim] against tokens [start, end): scores [kQueries][room]. Asks for the values meanwhile.
template <class T, int kQueries>
void scores_of(const float* query, const Tokens<T>& keys, const Tokens<T>& values, int64_t start, int64_t end, int64_t dim, float* scores,
               int64_t room) {
  int64_t whole = dim / 16 * 16;
  keys.each_stretch(start, end, [&](int64_t t, const T* place, int count) {
    v16 part[kQueries][16];
    const T* soon = values.at(t);
    for (int i = 0; i < 16; i++) {
      for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(soon + i * values.stride + d);
      const T* key = place + std::min(i, count - 1) * keys.stride;
      v16 acc[kQueries] = {};
      for (int64_t d = 0; d < whole; d += 16) {
        v16 k = load(key + d);
        for (int g = 0; g < kQueries; g++) acc[g] += load(query + g * dim + d) * k;
      }
      for (int64_t d = whole; d < dim; d++)
        for (int g = 0; g < kQueries; g++) acc[g][0] += query[g * dim + d] * to_float(key[d]);
      for (int g = 0; g < kQueries; g++) part[g][i] = acc[g];
    }
    for (int g = 0; g < kQueries; g++) store(scores + g * room + t - start, sum_each(part[g]));
  });
}

// Turns scores [count] into weights that add up to 1; room for a multiple of 16 behind them.
inline void softmax(float* scores, int64_t count) {
  for (int64_t i = count; i % 16; i++) scores[i] = -INFINITY;
  v16 best = splat(-INFINITY), total = {};
  for (int64_t i = 0; i < count; i += 16) best = larger(load(scores + i), best);
  float most = largest(best);
  for (int64_t i = 0; i < count; i += 16) {
    v16 e = exponential(load(scores + i) - most);
    store(scores + i, e);
    total += e;
  }
  float share = 1.0f / sum(total);
  for (int64_t i = 0; i < count; i += 16) store(scores + i, load(scores + i) * share);
}

// kQueries weighted sums of 16 * kVectors value columns from `first` on.
template <class T, int kQueries, int kVectors>
void mix(const float* weights, int64_t room, const Tokens<T>& values, int64_t start, int64_t end, int64_t first,
         int64_t dim, T* out) {
  v16 acc[kQueries][kVectors] = {};
  values.each_stretch(start, end, [&](int64_t t, const T* place, int count) {
    for (int i = 0; i < count; i++) {
      const T* value = place + i * values.stride + first;
      v16 v[kVectors];
      for (int j = 0; j < kVectors; j++) v[j] = load(value + 16 * j);
      for (int g = 0; g < kQueries; g++) {
        float w = weights[g * room + t - start + i];
        for (int j = 0; j < kVectors; j++) acc[g][j] += w * v[j];
      }
    }
  });
  for (int g = 0; g < kQueries; g++)
    for (int j = 0; j < kVectors; j++) store(out + g * dim + first + 16 * j, acc[g][j]);
}

template <class T, int kQueries>
void attend(const Paged& p, const T* query, const Tokens<T>& keys, const Tokens<T>& values, int64_t start,
            int64_t end, T* out, std::vector<float>& memory) {
  int64_t count = end - start, room = count + 32, dim = p.value_dim;
  memory.resize(kQueries * (room + p.key_dim));
  float *scores = memory.data(), *scaled = scores + kQueries * room;
  for (int64_t i = 0; i < kQueries * p.key_dim; i++) scaled[i] = to_float(query[i]) * p.scale;
  scores_of<T, kQueries>(scaled, keys, values, start, end, p.key_dim, scores, room);
  for (int g = 0; g < kQueries; g++) softmax(scores + g * room, count);
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) mix<T, kQueries, 4>(scores, room, values, start, end, d, dim, out);
  for (; d + 16 <= dim; d += 16) mix<T, kQueries, 1>(scores, room, values, start, end, d, dim, out);
  for (; d < dim; d++)
    for (int g = 0; g < kQueries; g++) {
      float total = 0;
      for (int64_t t = start; t < end; t++) total += scores[g * room + t - start] * to_float(values.at(t)[d]);
      out[g * dim + d] = from_float<T>(total);
    }
}

template <class T>
void attend_head(const Paged& p, int64_t s, int64_t head) {
  thread_local std::vector<float> memory;
  int64_t groups = p.heads / p.kv_heads, end = p.lengths[s], last = end - 1;
  int64_t start = p.window ? std::max<int64_t>(0, end - p.window) : 0;
  const int64_t* table = p.table + s * p.width;
  Tokens<T> keys{static_cast<T*>(p.keys) + head * p.key_dim, table, p.block_size, p.kv_heads * p.key_dim};
  Tokens<T> values{static_cast<T*>(p.values) + head * p.value_dim, table, p.block_size, p.kv_heads * p.value_dim};
  const T* key = static_cast<const T*>(p.key) + s * p.key_stride + head * p.key_dim;
  const T* value = static_cast<const T*>(p.value) + s * p.value_stride + head * p.value_dim;
  std::copy(key, key + p.key_dim, keys.at(last));
  std::copy(value, value + p.value_dim, values.at(last));
  const T* query = static_cast<const T*>(p.query) + s * p.query_stride + head * groups * p.key_dim;
  T* out = static_cast<T*>(p.out) + (s * p.heads + head * groups) * p.value_dim;
  while (groups > 0) {
    int taken = static_cast<int>(std::min<int64_t>(groups, 4));
    if (taken == 4) attend<T, 4>(p, query, keys, values, start, end, out, memory);
    else if (taken == 3) attend<T, 3>(p, query, keys, values, start, end, out, memory);
    else if (taken == 2) attend<T, 2>(p, query, keys, values, start, end, out, memory);
    else attend<T, 1>(p, query, keys, values, start, end, out, memory);
    groups -= taken;
    query += taken * p.key_dim;
    out += taken * p.value_dim;
  }
}

// A sequence's heads lie side by side in memory: one thread reads them all, unless there are too few sequences.
template <class T>
void paged_attention(Pool& pool, const Paged& p) {
  if (p.sequences >= 4 * pool.threads())
    pool.run(p.sequences, [&](int64_t s) {
      for (int64_t head = 0; head < p.kv_heads; head++) attend_head<T>(p, s, head);
    });
  else
    pool.run(p.sequences * p.kv_heads, [&](int64_t item) {
      attend_head<T>(p, item / p.kv_heads, item % p.kv_heads);
    });
}
