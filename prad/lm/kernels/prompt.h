// A prompt pass's attention: each of several packed sequences sees itself, and what it stored before, causally.
// Keys and values are packed as weights are (linear.h), so that both products are those of a linear layer: scores
// are queries by panels of 16 keys, the answer is weights by panels of 16 of the values' columns. Only the tokens that
// are given are answered so: those that decode has computed before are for answered.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "answered.h"
#include "linear.h"
#include "pool.h"
#include "vec.h"

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a panel whose columns lie side by side.
template <class T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
// 16 columns of as many rows.
inline void side_by_side(const float* rows, int64_t, float* to) { store(to, load(rows)); }
inline void side_by_side(const bf16* rows, int64_t stride, bf16* to) {
  store_lanes(to, load_halves(rows) | load_halves(rows + stride) << 16);
}

template <class T>
class PromptAttention {
 public:
  explicit PromptAttention(const PromptCall& call) : p(call) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < p.count; i++) {
      const PromptSpan& span = p.spans[i];
      int64_t seen = p.window ? std::max<int64_t>(0, span.stored + 1 - p.window) : 0;
      for (int64_t at = seen / kPart * kPart; at < reach(span); at += kPart) parts_.push_back({i, at});
      for (int64_t at = round_up(given(span), kRows) - kRows; at >= 0; at -= kRows) blocks_.push_back({i, at});  // longest first
      begins_.push_back(tokens);
      tokens += round_up(reach(span), kDepth);
    }
    tokens_ = tokens;
    packed().resize(tokens_ * p.kv_heads * (key_depth() + value_width()));
    keys_ = packed().data();
    values_ = keys_ + tokens_ * p.kv_heads * key_depth();
  }

  void run(Pool& pool) {
    pool.run(parts_.size() * p.kv_heads, [&](int64_t item) { pack(parts_[item / p.kv_heads], item % p.kv_heads); });
    pool.run(blocks_.size() * p.kv_heads, [&](int64_t item) { attend(blocks_[item / p.kv_heads], item % p.kv_heads); });
    if (packed().size() > kKept / sizeof(T)) std::vector<T>().swap(packed());
  }

 private:
  static constexpr size_t kKept = 64 << 20;  // bytes that stay for the next call
  static constexpr int64_t kPart = 256;      // tokens whose scores are kept at once
  static constexpr int64_t kScores = kPart + 16, kWeights = kPart + 32;  // of a row: rows shall not share cache sets
  struct Place {
    int64_t span, at;
  };

  static int64_t given(const PromptSpan& span) { return span.rows - span.answered; }
  // Tokens that the given ones see, and are.
  static int64_t reach(const PromptSpan& span) { return given(span) ? span.stored + given(span) : 0; }

  // Keys and values, packed: of the thread that calls; the others only use it.
  static std::vector<T>& packed() {
    thread_local std::vector<T> memory;
    return memory;
  }

  int64_t key_depth() const { return round_up(p.key_dim, kDepth); }
  int64_t value_width() const { return round_up(p.value_dim, kColumns); }
  T* keys_of(int64_t span, int64_t head) const {
    return keys_ + (begins_[span] * p.kv_heads + head * length(span)) * key_depth();
  }
  T* values_of(int64_t span, int64_t head) const {
    return values_ + (begins_[span] * p.kv_heads + head * length(span)) * value_width();
  }
  int64_t length(int64_t span) const { return round_up(reach(p.spans[span]), kDepth); }

  // Keys and values of the tokens from place.at on, zeros behind the last.
  void pack(Place place, int64_t head) const {
    const PromptSpan& span = p.spans[place.span];
    int64_t known = reach(span), end = std::min(place.at + kPart, length(place.span));
    T *keys = keys_of(place.span, head), *values = values_of(place.span, head);
    thread_local std::vector<T> memory;
    memory.assign(kPair<T> * value_width(), T{});
    for (int64_t t = place.at; t < end; t++) {
      T* panel = keys + t / kColumns * kColumns * key_depth() + t % kColumns * kPair<T>;
      T* pair = memory.data() + t % kPair<T> * value_width();
      int64_t d = 0;
      if (t < known) {
        const T* key = row_of<T>(p, span, t, p.key, p.key_stride, p.keys, head, p.key_dim);
        const T* value = row_of<T>(p, span, t, p.value, p.value_stride, p.values, head, p.value_dim);
        for (; d + kPair<T> <= p.key_dim; d += kPair<T>) std::memcpy(panel + d * kColumns, key + d, kPair<T> * sizeof(T));
        if (d < p.key_dim) panel[d * kColumns] = key[d], panel[d * kColumns + 1] = T{}, d += 2;  // an odd one
        std::copy(value, value + p.value_dim, pair);
      } else {
        std::fill(pair, pair + value_width(), T{});
      }
      for (; d < key_depth(); d += kPair<T>) std::memset(panel + d * kColumns, 0, kPair<T> * sizeof(T));
      if (t % kPair<T> + 1 < kPair<T>) continue;  // its neighbour is still to come
      for (int64_t c = 0; c < value_width(); c += kColumns)
        side_by_side(memory.data() + c, value_width(), values + c * length(place.span) + t / kPair<T> * kPair<T> * kColumns);
    }
  }

  // Up to kRows queries of all heads that share a key.
  void attend(Place place, int64_t kv_head) const {
    int64_t groups = p.heads / p.kv_heads;
    for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; head++) attend(place, kv_head, head);
  }

  void attend(Place place, int64_t kv_head, int64_t head) const {
    const PromptSpan& span = p.spans[place.span];
    const T *keys = keys_of(place.span, kv_head), *values = values_of(place.span, kv_head);
    int rows = static_cast<int>(std::min<int64_t>(kRows, given(span) - place.at));
    int64_t first = span.stored + place.at, end = first + rows;  // the queries' own tokens
    int64_t seen = p.window ? std::max<int64_t>(0, first + 1 - p.window) / kDepth * kDepth : 0;
    int64_t depth = key_depth(), width = value_width();
    thread_local std::vector<Read<T>> narrow;
    thread_local std::vector<float> wide;
    narrow.resize(kRows * (depth + kWeights));
    wide.resize(kRows * (width + kScores));
    Read<T> *queries = narrow.data(), *weights = queries + kRows * depth;
    float *scores = wide.data(), *sums = scores + kRows * kScores;
    float scale = p.scale * kLog2E, most[kRows], total[kRows];
    std::fill(sums, sums + rows * width, 0.0f);
    std::fill(most, most + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    for (int r = 0; r < rows; r++) {
      const T* from = static_cast<const T*>(p.query) + (span.start + place.at + r) * p.query_stride + head * p.key_dim;
      read(from, queries + r * depth, p.key_dim);
      std::fill(queries + r * depth + p.key_dim, queries + (r + 1) * depth, Read<T>{});
    }
    begin_rows<T>(rows);
    for (int64_t t = seen, next; t < end; t = next) {
      next = (t / kPart + 1) * kPart;  // of the sequence's own tokens: a query's parts are the same in any chunk
      int64_t count = round_up(std::min(next, end) - t, kDepth);
      multiply_side_by_side<false>(queries, depth, rows, keys + t * depth, depth * kColumns, count / kColumns, depth,
                                   scores, kScores);
      for (int r = 0; r < rows; r++) {
        float* row = scores + r * kScores;
        if (t + count > first + 1 || (p.window && t <= end - 1 - p.window)) hide(row, count, first + r - t);
        v16 best = splat(most[r]);
        for (int64_t k = 0; k < count; k += kColumns) best = larger(load(row + k), best);
        float now = largest(best), shift = now == -INFINITY ? 0 : now * scale;
        v16 added = {};
        for (int64_t k = 0; k < count; k += kColumns) {
          v16 weight = power_of_two(load(row + k) * scale - shift);
          store(weights + r * kWeights + k, weight);
          added += weight;
        }
        if (now != most[r] && total[r] > 0) {  // what was summed so far was weighed against less
          float shrink = std::exp2((most[r] - now) * scale);
          for (int64_t d = 0; d < width; d += kColumns) store(sums + r * width + d, load(sums + r * width + d) * shrink);
          total[r] *= shrink;
        }
        most[r] = now;
        total[r] += sum(added);
      }
      multiply_side_by_side<true>(weights, kWeights, rows, values + t * kColumns, length(place.span) * kColumns,
                                  width / kColumns, count, sums, width);
    }
    end_rows<T>();
    for (int r = 0; r < rows; r++) {
      T* to = static_cast<T*>(p.out) + ((span.start + place.at + r) * p.heads + head) * p.value_dim;
      int64_t d = 0;
      for (; d + kColumns <= p.value_dim; d += kColumns) store(to + d, load(sums + r * width + d) / total[r]);
      for (; d < p.value_dim; d++) to[d] = from_float<T>(sums[r * width + d] / total[r]);
    }
  }

  // Takes from `count` scores those that a query `own` tokens behind the first of them does not see.
  void hide(float* scores, int64_t count, int64_t own) const {
    int64_t begin = p.window ? std::clamp<int64_t>(own + 1 - p.window, 0, count) : 0;
    std::fill(scores, scores + begin, -INFINITY);
    std::fill(scores + std::clamp<int64_t>(own + 1, 0, count), scores + count, -INFINITY);
  }

  const PromptCall& p;
  std::vector<Place> parts_, blocks_;  // of all spans: keys to pack, queries to answer
  std::vector<int64_t> begins_;        // of each span, in packed tokens
  int64_t tokens_;
  T *keys_, *values_;
};

template <class T>
void prompt_attention(Pool& pool, const PromptCall& call) {
  PromptAttention<T>(call).run(pool);
  AnsweredAttention<T>(call).run(pool);
}
