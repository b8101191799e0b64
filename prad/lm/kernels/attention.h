// One decode step's attention: each sequence stores its new key and value in its blocks and attends over them.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "vec.h"

// Sums of lanes: lane i becomes the sum of register i's lanes, of four registers at a time.
template <int kDistance, int... i>
inline Register halves(Register a, Register b, std::integer_sequence<int, i...>) {
  return shuffled<(i & kDistance ? kInRegister + i : i)...>(a, b) +
         shuffled<(i & kDistance ? kInRegister : 0) + (i ^ kDistance)...>(a, b);
}
template <int kDistance>
inline Register halves(Register a, Register b) {
  return halves<kDistance>(a, b, std::make_integer_sequence<int, kInRegister>{});
}
inline Register quarter(const Register* x) { return halves<2>(halves<1>(x[0], x[1]), halves<1>(x[2], x[3])); }
inline Register sum_of_quarters(const Register* x) {
  if constexpr (kInRegister == 16) return halves<8>(halves<4>(x[0], x[1]), halves<4>(x[2], x[3]));
  if constexpr (kInRegister == 8) return halves<4>(x[0], x[1]);
  return x[0];
}

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
  // the scores are computed, and the next keys while the values are mixed. Inline always: GCC leaves a call out that
  // does nothing else.
  __attribute__((always_inline)) void fetch(const T* place) const {
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(place + d);
  }

  // body(first token, its place, count) for every stretch of at most 16 tokens that lie side by side
  template <class Body>
  __attribute__((always_inline)) void each_stretch(const Body& body) const {
    for (int64_t t = start; t < end;) {
      int64_t next = std::min(end, (t / block_size + 1) * block_size);
      for (const T* place = at(t); t < next; t += 16, place += 16 * stride)
        body(t, place, static_cast<int>(std::min<int64_t>(16, next - t)));
      t = next;
    }
  }
};

// kQueries queries against one key: a register each whose lanes add up to the product. kTail: dim is no multiple of 16.
template <class T, int kQueries, bool kTail>
struct Products {
  const float* query;  // [kQueries][dim]
  int64_t dim;

  Products(const T* from, int64_t dim, std::vector<float>& memory) : dim(dim) {
    memory.resize(kQueries * dim);
    for (int64_t i = 0; i < kQueries * dim; i++) memory[i] = to_float(from[i]);
    query = memory.data();
  }
  void with(const T* key, Register* out, int64_t stride) const {
    v16 acc[kQueries];
    each<kQueries>([&](auto g) { acc[g] = v16{}; });
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      v16 k = load(key + d);
      each<kQueries>([&](auto g) { acc[g] = fused(load(query + g * dim + d), k, acc[g]); });
    }
    if (kTail) {
      v16 k = load_some(key + d, dim - d);
      each<kQueries>([&](auto g) { acc[g] = fused(load_some(query + g * dim + d, dim - d), k, acc[g]); });
    }
    each<kQueries>([&](auto g) { out[g * stride] = folded(acc[g]); });
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
  void with(const bf16* key, Register* out, int64_t stride) const {
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
    for (int first = 0; first < count; first += kInRegister) {
      Register sums[kQueries][kInRegister / 4];
#pragma GCC unroll 4
      for (int at = 0; at < kInRegister / 4; at++) {
        Register part[kQueries][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          int token = std::min(first + at * 4 + i, count - 1);
          values.fetch(soon + token * values.stride);
          products.with(place + token * keys.stride, &part[0][i], 4);
        }
        for (int g = 0; g < kQueries; g++) sums[g][at] = quarter(part[g]);
      }
      float* to = scores + t - keys.start + first;
      for (int g = 0; g < kQueries; g++) store(to + g * room, sum_of_quarters(sums[g]) * scale);
    }
  });
}

// One query's answer while its context is seen in parts: the sum of values, each weighted with
// exp(score - most), and the sum of the weights.
struct Answer {
  float *sum, *most, *total;  // [value_dim], one, one

  // Makes scores [count] of a further part weights, and what was summed so far comparable with them. Room for a
  // multiple of 16 behind them.
  void weigh(float* scores, int64_t count, int64_t dim) const {
    for (int64_t i = count; i % 16; i++) scores[i] = -INFINITY;
    v16 best = splat(*most), added = {};
    for (int64_t i = 0; i < count; i += 16) best = larger(load(scores + i), best);
    float now = largest(best), shrink = std::exp(*most - now);
    for (int64_t i = 0; i < count; i += 16) {
      v16 e = exponential(load(scores + i) - now);
      store(scores + i, e);
      added += e;
    }
    for (int64_t d = 0; d < dim; d++) sum[d] *= shrink;
    *most = now;
    *total = *total * shrink + ::sum(added);
  }
};

// Of several queries that have seen nothing yet; a thread has one at a time.
struct Answers {
  int64_t dim;
  std::vector<Answer> each;

  Answers(int64_t count, int64_t dim) : dim(dim), each(count) {
    thread_local std::vector<float> memory;
    memory.assign(count * (dim + 2), 0.0f);
    for (int64_t i = 0; i < count; i++) {
      float* sum = memory.data() + i * (dim + 2);
      each[i] = {sum, sum + dim, sum + dim + 1};
      *each[i].most = -INFINITY;
    }
  }
  template <class T>
  void write(T* out) const {
    for (const Answer& answer : each)
      for (int64_t d = 0; d < dim; d++) *out++ = from_float<T>(answer.sum[d] / *answer.total);
  }
};

// Adds kQueries weighted sums of 16 * kVectors value columns from `first` on.
template <class T, int kQueries, int kVectors>
void mix(const float* weights, int64_t room, const Tokens<T>& values, const Tokens<T>& next_keys, int64_t first,
         const Answer* answers) {
  v16 acc[kQueries * kVectors];
  each<kQueries * kVectors>([&](auto n) { acc[n] = v16{}; });
  values.each_stretch([&](int64_t t, const T* place, int count) __attribute__((always_inline)) {  // acc in registers
    const T* soon = next_keys.at(std::min(next_keys.end - 1, next_keys.start + t - values.start));
    for (int i = 0; i < count; i++) {
      next_keys.fetch(soon + i * next_keys.stride);
      const T* value = place + i * values.stride + first;
      const float* weight = weights + t - values.start + i;
      each<kVectors>([&](auto j) {
        const v16 v = load(value + 16 * j);
        if (kRegisters > 1) asm("" : "+r"(weight));  // loaded anew: there is no register to keep them in
        each<kQueries>([&](auto g) { add_product(acc[g * kVectors + j], splat(weight[g * room]), v); });
      });
    }
  });
  each<kQueries * kVectors>([&](auto n) {
    float* to = answers[n / kVectors].sum + first + 16 * (n % kVectors);
    store(to, load(to) + acc[n]);
  });
}

// A part of a context: keys and values are its tokens.
template <class T, int kQueries>
void attend(float scale, const T* query, const Tokens<T>& keys, const Tokens<T>& values, const Tokens<T>& next_keys,
            const Answer* answers) {
  thread_local std::vector<float> memory, wide;
  int64_t count = keys.end - keys.start, room = count + 32, dim = values.dim;
  memory.resize(kQueries * room);
  float* scores = memory.data();
  auto score = [&](const auto& products) {
    scores_of<std::decay_t<decltype(products)>, T, kQueries>(products, keys, values, scale, scores, room);
  };
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    if (keys.dim == 64) score(PairProducts<kQueries, 2>(query, 64, wide));
    else if (keys.dim == 128) score(PairProducts<kQueries, 4>(query, 128, wide));
    else score(Products<T, kQueries, true>(query, keys.dim, wide));
  } else
#endif
    if (keys.dim % 16 == 0) score(Products<T, kQueries, false>(query, keys.dim, wide));
    else score(Products<T, kQueries, true>(query, keys.dim, wide));
  for (int g = 0; g < kQueries; g++) answers[g].weigh(scores + g * room, count, dim);
  int64_t d = 0;
  // whose sums stay in registers: 32 of AVX-512, or 16
  constexpr int kVectors = kRegisters == 1 ? 4 : kRegisters * kQueries <= 6 ? 2 : 1;
  for (; d + 16 * kVectors <= dim; d += 16 * kVectors)
    mix<T, kQueries, kVectors>(scores, room, values, next_keys, d, answers);
  for (; d + 16 <= dim; d += 16) mix<T, kQueries, 1>(scores, room, values, next_keys, d, answers);
  for (; d < dim; d++)
    for (int g = 0; g < kQueries; g++)
      for (int64_t t = values.start; t < values.end; t++)
        answers[g].sum[d] += scores[g * room + t - values.start] * to_float(values.at(t)[d]);
}

// The same for all queries of a KV head.
template <class T>
void attend_all(float scale, int64_t queries, const T* query, const Tokens<T>& keys, const Tokens<T>& values,
                const Tokens<T>& next_keys, const Answer* answers) {
  for (int64_t left = queries; left > 0;) {
    int taken = static_cast<int>(std::min<int64_t>(left, 4));
    if (taken == 4) attend<T, 4>(scale, query, keys, values, next_keys, answers);
    else if (taken == 3) attend<T, 3>(scale, query, keys, values, next_keys, answers);
    else if (taken == 2) attend<T, 2>(scale, query, keys, values, next_keys, answers);
    else attend<T, 1>(scale, query, keys, values, next_keys, answers);
    left -= taken;
    query += taken * keys.dim;
    answers += taken;
  }
}

// Some KV heads of one sequence. They share lines and pages of memory, so all of them see a part of the context
// that fits into a core's cache before the next part is read.
template <class T>
struct Heads {
  static constexpr int64_t kPart = 512;  // tokens

  const AttentionCall& p;
  const PagedView& view;
  int64_t sequence, first, last;
  int64_t next_sequence, next_first;  // whose keys are asked for meanwhile: those that this thread is likely to take next

  // Stores the new keys and values.
  void store() const {
    for (int64_t head = first; head < last; head++) keep(head, view.lengths[sequence]);
  }

  void run() const {
    const int64_t end = view.lengths[sequence], start = begin(end);
    const T* query = static_cast<const T*>(p.query) + sequence * p.query_stride;
    Answers answers((last - first) * groups(), p.value_dim);
    for (int64_t at = start; at < end; at += kPart) {
      int64_t stop = std::min(end, at + kPart);
      for (int64_t head = first; head < last; head++) {
        Tokens<T> next_keys = head + 1 < last ? tokens(p.keys, p.key_dim, sequence, head + 1, at, stop)
                              : stop < end    ? tokens(p.keys, p.key_dim, sequence, first, stop, std::min(end, stop + kPart))
                                              : first_keys();
        attend_all(p.scale, groups(), query + head * groups() * p.key_dim, tokens(p.keys, p.key_dim, sequence, head, at, stop),
                   tokens(p.values, p.value_dim, sequence, head, at, stop), next_keys,
                   answers.each.data() + (head - first) * groups());
      }
    }
    answers.write(static_cast<T*>(p.out) + (sequence * p.heads + first * groups()) * p.value_dim);
  }

 private:
  int64_t groups() const { return p.heads / p.kv_heads; }

  // The first token that a sequence of `end` tokens sees.
  int64_t begin(int64_t end) const { return p.window ? std::max<int64_t>(0, end - p.window) : 0; }

  Tokens<T> tokens(void* pool, int64_t dim, int64_t of, int64_t head, int64_t start, int64_t end) const {
    return {static_cast<T*>(pool) + head * dim, view.table + of * view.width, p.block_size, p.kv_heads * dim, dim, start, end};
  }

  Tokens<T> first_keys() const {
    const int64_t end = view.lengths[next_sequence], start = begin(end);
    return tokens(p.keys, p.key_dim, next_sequence, next_first, start, std::min(end, start + kPart));
  }

  // Stores the new key and value of a head.
  void keep(int64_t head, int64_t end) const {
    const T* key = static_cast<const T*>(p.key) + sequence * p.key_stride + head * p.key_dim;
    const T* value = static_cast<const T*>(p.value) + sequence * p.value_stride + head * p.value_dim;
    std::copy(key, key + p.key_dim, tokens(p.keys, p.key_dim, sequence, head, 0, end).at(end - 1));
    std::copy(value, value + p.value_dim, tokens(p.values, p.value_dim, sequence, head, 0, end).at(end - 1));
  }
};

template <class T>
void paged_attention(Pool& pool, const AttentionCall& p, int64_t sequences, const PagedView& view) {
  int64_t share = sequences < 4 * pool.threads() ? 1 : p.kv_heads, parts = p.kv_heads / share;
  const int64_t items = sequences * parts;
  auto heads = [&](int64_t item) {
    const int64_t first = item % parts * share, next = item + pool.threads() < items ? item + pool.threads() : item;
    return Heads<T>{p, view, item / parts, first, first + share, next / parts, next % parts * share};
  };
  if (view.drafted) pool.run(items, [&](int64_t item) { heads(item).store(); });
  pool.run(items, [&](int64_t item) {
    if (!view.drafted) heads(item).store();
    heads(item).run();
  });
}
