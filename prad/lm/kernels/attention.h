// One decode step's attention: each sequence stores its new key and value in its blocks and attends over them.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

// Where a step's sequences lie; all layers share it.
struct PagedView {
  const int64_t* table;    // [sequences, width] block numbers
  const int64_t* lengths;  // [sequences] tokens in the cache, the new one included
  int64_t width;
  const void* const* vectors;  // [sites, sequences] request state [layers, width of the site], or null
};

struct AttentionCall {
  const void *query, *key, *value;  // [sequences, heads, dim] with a stride per sequence, in elements
  int64_t query_stride, key_stride, value_stride;
  void *keys, *values;  // [blocks, block_size, kv_heads, dim]
  void* out;            // [sequences, heads, value_dim]
  int64_t heads, kv_heads, key_dim, value_dim, block_size;
  int64_t window;  // latest tokens seen, 0: all
  float scale;
};

// Sums of lanes: after level 3 over 16 vectors, lane i is the sum over vector i.
template <int kLevel>
inline v16 halves(v16 a, v16 b) {
  constexpr i16x first[4] = {{0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31},
                             {0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31},
                             {0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31},
                             {0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31}};
  constexpr i16x second[4] = {{1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30},
                              {2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29},
                              {4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27},
                              {8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}};
  return __builtin_shuffle(a, b, first[kLevel]) + __builtin_shuffle(a, b, second[kLevel]);
}
inline v16 quarters(const v16* x) { return halves<1>(halves<0>(x[0], x[1]), halves<0>(x[2], x[3])); }
inline v16 sum_of_quarters(const v16* x) { return halves<3>(halves<2>(x[0], x[1]), halves<2>(x[2], x[3])); }

// One KV head of the tokens [start, end) of a sequence in a pool.
template <class T>
struct Tokens {
  T* pool;
  const int64_t* table;
  int64_t block_size, stride, dim, start, end;

  T* at(int64_t token) const {
    return pool + (table[token / block_size] * block_size + token % block_size) * stride;
  }

  // Asks for a token's row. Memory is slower than the arithmetic, so the two must overlap: the values come while
  // the scores are computed, and the next keys while the values are mixed.
  void fetch(const T* place) const {
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(place + d);
  }

  // body(first token, its place, count) for every stretch of at most 16 tokens that lie side by side
  template <class Body>
  void each_stretch(const Body& body) const {
    for (int64_t t = start; t < end;) {
      int64_t next = std::min(end, (t / block_size + 1) * block_size);
      for (const T* place = at(t); t < next; t += 16, place += 16 * stride)
        body(t, place, static_cast<int>(std::min<int64_t>(16, next - t)));
      t = next;
    }
  }
};

// kQueries queries against one key: a vector each whose lanes add up to the product.
template <class T, int kQueries>
struct Products {
  const float* query;  // [kQueries][dim]
  int64_t dim;

  Products(const T* from, int64_t dim, std::vector<float>& memory) : dim(dim) {
    memory.resize(kQueries * dim);
    for (int64_t i = 0; i < kQueries * dim; i++) memory[i] = to_float(from[i]);
    query = memory.data();
  }
  void with(const T* key, v16* out, int64_t stride) const {
    v16 acc[kQueries] = {};
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      v16 k = load(key + d);
      for (int g = 0; g < kQueries; g++) acc[g] += load(query + g * dim + d) * k;
    }
    for (; d < dim; d++)
      for (int g = 0; g < kQueries; g++) acc[g][0] += query[g * dim + d] * to_float(key[d]);
    for (int g = 0; g < kQueries; g++) out[g * stride] = acc[g];
  }
};

#ifdef __AVX512BF16__
// The same without widening, for heads of kPairs * 32.
template <int kQueries, int kPairs>
struct PairProducts {
  __m512bh query[kQueries][kPairs];

  PairProducts(const bf16* from, int64_t, std::vector<float>&) {
    for (int g = 0; g < kQueries; g++)
      for (int d = 0; d < kPairs; d++) query[g][d] = (__m512bh)_mm512_loadu_si512(from + (g * kPairs + d) * 32);
  }
  void with(const bf16* key, v16* out, int64_t stride) const {
    __m512 acc[kQueries];
    for (int g = 0; g < kQueries; g++) acc[g] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int d = 0; d < kPairs; d++) {
      __m512bh k = (__m512bh)_mm512_loadu_si512(key + d * 32);
      for (int g = 0; g < kQueries; g++) acc[g] = _mm512_dpbf16_ps(acc[g], query[g][d], k);
    }
    for (int g = 0; g < kQueries; g++) out[g * stride] = (v16)acc[g];
  }
};
#endif

// Scores [kQueries][room] of the tokens.
template <class Dot, class T, int kQueries>
void scores_of(const Dot& products, const Tokens<T>& keys, const Tokens<T>& values, float scale, float* scores,
               int64_t room) {
  keys.each_stretch([&](int64_t t, const T* place, int count) {
    const T* soon = values.at(t);
    v16 sums[kQueries][4];
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      v16 part[kQueries][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        int token = std::min(quarter * 4 + i, count - 1);
        values.fetch(soon + token * values.stride);
        products.with(place + token * keys.stride, &part[0][i], 4);
      }
      for (int g = 0; g < kQueries; g++) sums[g][quarter] = quarters(part[g]);
    }
    for (int g = 0; g < kQueries; g++) store(scores + g * room + t - keys.start, sum_of_quarters(sums[g]) * scale);
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
void mix(const float* weights, int64_t room, const Tokens<T>& values, const Tokens<T>& next_keys, int64_t first,
         T* out) {
  int64_t dim = values.dim;
  v16 acc[kQueries][kVectors] = {};
  values.each_stretch([&](int64_t t, const T* place, int count) {
    const T* soon = next_keys.at(std::min(next_keys.end - 1, next_keys.start + t - values.start));
    for (int i = 0; i < count; i++) {
      next_keys.fetch(soon + i * next_keys.stride);
      const T* value = place + i * values.stride + first;
      v16 v[kVectors];
      for (int j = 0; j < kVectors; j++) v[j] = load(value + 16 * j);
      for (int g = 0; g < kQueries; g++) {
        float w = weights[g * room + t - values.start + i];
        for (int j = 0; j < kVectors; j++) acc[g][j] += w * v[j];
      }
    }
  });
  for (int g = 0; g < kQueries; g++)
    for (int j = 0; j < kVectors; j++) store(out + g * dim + first + 16 * j, acc[g][j]);
}

template <class T, int kQueries>
void attend(const AttentionCall& p, const T* query, const Tokens<T>& keys, const Tokens<T>& values,
            const Tokens<T>& next_keys, T* out) {
  thread_local std::vector<float> memory, wide;
  int64_t count = keys.end - keys.start, room = count + 32, dim = values.dim;
  memory.resize(kQueries * room);
  float* scores = memory.data();
  auto score = [&](const auto& products) {
    scores_of<std::decay_t<decltype(products)>, T, kQueries>(products, keys, values, p.scale, scores, room);
  };
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if (keys.dim == 64) score(PairProducts<kQueries, 2>(query, 64, wide));
    else if (keys.dim == 128) score(PairProducts<kQueries, 4>(query, 128, wide));
    else score(Products<T, kQueries>(query, keys.dim, wide));
  } else
#endif
    score(Products<T, kQueries>(query, keys.dim, wide));
  for (int g = 0; g < kQueries; g++) softmax(scores + g * room, count);
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) mix<T, kQueries, 4>(scores, room, values, next_keys, d, out);
  for (; d + 16 <= dim; d += 16) mix<T, kQueries, 1>(scores, room, values, next_keys, d, out);
  for (; d < dim; d++)
    for (int g = 0; g < kQueries; g++) {
      float total = 0;
      for (int64_t t = values.start; t < values.end; t++)
        total += scores[g * room + t - values.start] * to_float(values.at(t)[d]);
      out[g * dim + d] = from_float<T>(total);
    }
}

// The KV heads [first, last) of all sequences, in the order in which their memory lies.
template <class T>
struct Heads {
  const AttentionCall& p;
  const PagedView& view;

  Tokens<T> tokens(void* pool, int64_t dim, int64_t item) const {
    int64_t s = item / p.kv_heads, end = view.lengths[s];
    int64_t start = p.window ? std::max<int64_t>(0, end - p.window) : 0;
    return {static_cast<T*>(pool) + item % p.kv_heads * dim, view.table + s * view.width, p.block_size,
            p.kv_heads * dim, dim, start, end};
  }

  void run(int64_t first, int64_t last) const {
    Tokens<T> keys = tokens(p.keys, p.key_dim, first);
    for (int64_t item = first; item < last; item++) {
      Tokens<T> next_keys = tokens(p.keys, p.key_dim, std::min(item + 1, last - 1));
      attend_all(item, keys, next_keys);
      keys = next_keys;
    }
  }

 private:
  void attend_all(int64_t item, const Tokens<T>& keys, const Tokens<T>& next_keys) const {
    int64_t s = item / p.kv_heads, head = item % p.kv_heads, groups = p.heads / p.kv_heads;
    Tokens<T> values = tokens(p.values, p.value_dim, item);
    const T* key = static_cast<const T*>(p.key) + s * p.key_stride + head * p.key_dim;
    const T* value = static_cast<const T*>(p.value) + s * p.value_stride + head * p.value_dim;
    std::copy(key, key + p.key_dim, keys.at(keys.end - 1));
    std::copy(value, value + p.value_dim, values.at(values.end - 1));
    const T* query = static_cast<const T*>(p.query) + s * p.query_stride + head * groups * p.key_dim;
    T* out = static_cast<T*>(p.out) + (s * p.heads + head * groups) * p.value_dim;
    while (groups > 0) {
      int taken = static_cast<int>(std::min<int64_t>(groups, 4));
      if (taken == 4) attend<T, 4>(p, query, keys, values, next_keys, out);
      else if (taken == 3) attend<T, 3>(p, query, keys, values, next_keys, out);
      else if (taken == 2) attend<T, 2>(p, query, keys, values, next_keys, out);
      else attend<T, 1>(p, query, keys, values, next_keys, out);
      groups -= taken;
      query += taken * p.key_dim;
      out += taken * p.value_dim;
    }
  }
};

template <class T>
void paged_attention(Pool& pool, const AttentionCall& p, int64_t sequences, const PagedView& view) {
  int64_t heads = sequences * p.kv_heads, share = sequences < 4 * pool.threads() ? 1 : p.kv_heads;
  pool.run((heads + share - 1) / share, [&](int64_t item) {
    Heads<T>{p, view}.run(item * share, std::min(heads, (item + 1) * share));
  });
}
