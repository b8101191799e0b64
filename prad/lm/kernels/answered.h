// Tokens of a prompt pass that a decode step has computed before, when an answer goes on: they are attended as there
// (attention.h), one by one over the same parts of their context, so that they have the same bits again.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "pool.h"

// A token's key or value of a head, wherever it lies: `now` in the pass, or `before` it in a pool.
template <class T>
const T* row_of(const PromptCall& p, const PromptSpan& span, int64_t token, const void* now, int64_t stride,
                const void* before, int64_t kv_head, int64_t dim) {
  if (token >= span.stored) return static_cast<const T*>(now) + (span.start + token - span.stored) * stride + kv_head * dim;
  return static_cast<const T*>(before) + (span.slots[token] * p.kv_heads + kv_head) * dim;
}

template <class T>
class AnsweredAttention {
 public:
  explicit AnsweredAttention(const PromptCall& call) : p(call) {
    size_t size = 0;
    for (int64_t i = 0; i < p.count; i++) {
      const PromptSpan& span = p.spans[i];
      if (!span.answered) continue;
      int64_t end = span.stored + span.rows, first = begin(end - span.answered + 1);
      for (int64_t t = end - span.answered; t < end; t++) tokens_.push_back({contexts_.size(), t});
      contexts_.push_back({i, first, end - first, size});
      size += (end - first) * p.kv_heads * (p.key_dim + p.value_dim);
    }
    if (rows().size() < size) rows().resize(size);
    rows_ = rows().data();
  }

  void run(Pool& pool) {
    if (tokens_.empty()) return;
    pool.run(contexts_.size() * p.kv_heads, [&](int64_t item) { copy(contexts_[item / p.kv_heads], item % p.kv_heads); });
    pool.run(tokens_.size() * p.kv_heads, [&](int64_t item) { attend(tokens_[item / p.kv_heads], item % p.kv_heads); });
    if (rows().size() > kKept / sizeof(T)) std::vector<T>().swap(rows());
  }

 private:
  static constexpr size_t kKept = 64 << 20;  // bytes that stay for the next call

  // What the answered tokens of a span see: tokens from `first` on, whose keys and values lie from rows_ + at on.
  struct Context {
    int64_t span, first, count;
    size_t at;
  };
  struct Token {
    size_t context;
    int64_t number;  // in its sequence
  };

  // Of the thread that calls; the others only use it.
  static std::vector<T>& rows() {
    thread_local std::vector<T> memory;
    return memory;
  }

  // The first token that the last of `end` tokens sees.
  int64_t begin(int64_t end) const { return p.window ? std::max<int64_t>(0, end - p.window) : 0; }

  T* keys(const Context& context, int64_t kv_head) const {
    return rows_ + context.at + kv_head * context.count * (p.key_dim + p.value_dim);
  }
  T* values(const Context& context, int64_t kv_head) const { return keys(context, kv_head) + context.count * p.key_dim; }

  // A head's keys and values side by side.
  void copy(const Context& context, int64_t kv_head) const {
    const PromptSpan& span = p.spans[context.span];
    T *key = keys(context, kv_head), *value = values(context, kv_head);
    for (int64_t t = context.first; t < context.first + context.count; t++) {
      key = std::copy_n(row_of<T>(p, span, t, p.key, p.key_stride, p.keys, kv_head, p.key_dim), p.key_dim, key);
      value = std::copy_n(row_of<T>(p, span, t, p.value, p.value_stride, p.values, kv_head, p.value_dim), p.value_dim, value);
    }
  }

  // The queries that share a key.
  void attend(const Token& token, int64_t kv_head) const {
    const Context& context = contexts_[token.context];
    const PromptSpan& span = p.spans[context.span];
    const int64_t groups = p.heads / p.kv_heads, row = span.start + token.number - span.stored, block = 0;
    const int64_t end = token.number + 1;
    auto part = [&](T* rows, int64_t dim, int64_t from, int64_t to) {
      return Tokens<T>{rows, &block, context.count, dim, dim, from - context.first, to - context.first};
    };
    const T* query = static_cast<const T*>(p.query) + row * p.query_stride + kv_head * groups * p.key_dim;
    Answers answers(groups, p.value_dim);
    for (int64_t from = begin(end), to; from < end; from = to) {
      to = std::min(end, from + Heads<T>::kPart);
      const Tokens<T> seen = part(keys(context, kv_head), p.key_dim, from, to);
      attend_all(p.scale, groups, query, seen, part(values(context, kv_head), p.value_dim, from, to), seen, answers.each.data());
    }
    answers.write(static_cast<T*>(p.out) + (row * p.heads + kv_head * groups) * p.value_dim);
  }

  const PromptCall& p;
  std::vector<Context> contexts_;
  std::vector<Token> tokens_;
  T* rows_;
};
