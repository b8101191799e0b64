// The kernels' C interface, as library.py declares it. `half` says bfloat16, else float.
#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace {
template <class T, class W>
void run_linear(Pool& pool, const Linear& w, const void* x, int64_t rows, int64_t stride, int32_t mode, int32_t act,
                void* out, int64_t out_stride) {
  Sink<T> sink{w, static_cast<Out>(mode), static_cast<Activation>(act), out, out_stride};
  linear<T, W>(pool, w, static_cast<const T*>(x), rows, stride, sink);
}
}  // namespace

extern "C" {
Pool* prad_pool(int32_t threads) { return new Pool(threads); }
void prad_pool_free(Pool* pool) { delete pool; }
int32_t prad_has_amx() { return allow_amx(); }
int64_t prad_paged_size() { return sizeof(Paged); }

void prad_linear(Pool* pool, const Linear* w, const void* x, int64_t rows, int64_t stride, int32_t mode, int32_t act,
                 void* out, int64_t out_stride) {
  switch (static_cast<Weights>(w->weights)) {
    case Weights::f32:
      return run_linear<float, float>(*pool, *w, x, rows, stride, mode, act, out, out_stride);
    case Weights::bf16:
      return run_linear<bf16, bf16>(*pool, *w, x, rows, stride, mode, act, out, out_stride);
    case Weights::int8:
      return run_linear<bf16, int8_t>(*pool, *w, x, rows, stride, mode, act, out, out_stride);
  }
}

void prad_norm(Pool* pool, int32_t half, const float* x, int64_t rows, int64_t width, const float* weight,
               const float* bias, int32_t center, float epsilon, void* out) {
  if (half) norm(*pool, x, rows, width, weight, bias, center, epsilon, static_cast<bf16*>(out));
  else norm(*pool, x, rows, width, weight, bias, center, epsilon, static_cast<float*>(out));
}

void prad_rotate(Pool* pool, int32_t half, void* x, int64_t rows, int64_t stride, int64_t heads, int64_t queries,
                 int64_t dim, const float* cosine, const float* sine, const float* q_norm, const float* k_norm,
                 float epsilon) {
  if (half)
    rotate(*pool, static_cast<bf16*>(x), rows, stride, heads, queries, dim, cosine, sine, q_norm, k_norm, epsilon);
  else
    rotate(*pool, static_cast<float*>(x), rows, stride, heads, queries, dim, cosine, sine, q_norm, k_norm, epsilon);
}

void prad_paged_attention(Pool* pool, int32_t half, const Paged* p) {
  if (half) paged_attention<bf16>(*pool, *p);
  else paged_attention<float>(*pool, *p);
}

void prad_argmax(Pool* pool, int32_t half, const void* x, int64_t rows, int64_t width, int64_t* out) {
  if (half) argmax(*pool, static_cast<const bf16*>(x), rows, width, out);
  else argmax(*pool, static_cast<const float*>(x), rows, width, out);
}
}
