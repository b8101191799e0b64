// Made of operations.py by `python -m deploy.kernel_header`.
#pragma once
#include <cstdint>

// How a layer's weights are kept (linear.h); from fours on in blocks of 32 inputs (blocks.h), mixed: each panel in
// its own way.
enum class Weights : int32_t { f32 = 0, bf16 = 1, int8 = 2, fours = 3, eights = 4, k_fours = 5, k_sixes = 6, mixed = 7 };

// What becomes of a linear layer's result: stored in the activations' dtype, added to float32 rows, columns in pairs
// as act(first half) * second half, or stored in float32 as it was summed, without an activation.
enum class Out : int32_t { store = 0, add = 1, gated = 2, wide = 3 };

// f of a linear layer, or alone.
enum class Activation : int32_t { none = 0, silu = 1, gelu_tanh = 2, relu = 3 };

// The operations.
enum class Kind : int32_t { linear = 0, norm = 1, rotate = 2, attention = 3, argmax = 4, low_rank = 5, scale = 6, activate = 7, prompt = 8, affine = 9, mean = 10 };

// One of a list of calls; half: the activations are bfloat16, else float.
struct Call {
  Kind kind;
  int32_t half;
  const void* arguments;
};
static_assert(sizeof(Call) == 16);

// Where a step's sequences lie, for all layers: block table [sequences, width], and lengths [sequences] with the new
// token; and their request state, for `scale`: addresses [sites, sequences] of vectors [layers, width of the site], 0
// for none. drafted: whether some sequences are one with a draft behind it, which see each other's new tokens.
struct PagedView {
  const int64_t* table;
  const int64_t* lengths;
  int64_t width;
  const void* const* vectors;
  int32_t drafted;
};
static_assert(sizeof(PagedView) == 40);

// Rows [start, stop) with matrices of their own: down [layers, width_in, r], bias [layers, r] or null, up [layers, r,
// width_out].
struct LowRankSpan {
  int64_t start;
  int64_t stop;
  const void* down;
  const float* bias;
  const void* up;
  int64_t r;
  float factor;
};
static_assert(sizeof(LowRankSpan) == 56);

// A sequence: rows [start, start + rows) of a pass, behind tokens that lie at slots [stored] of the pools. answered:
// how many rows, from the last one back, a decode step has computed before.
struct PromptSpan {
  int64_t start;
  int64_t rows;
  const int64_t* slots;
  int64_t stored;
  int64_t answered;
};
static_assert(sizeof(PromptSpan) == 40);

// A linear layer's weights; all in the order of the panels' columns. int8 has a scale for each, and what its sums are
// too large by where rows have 128 added. bias: or null. places: of mixed weights, for each panel at which byte it
// begins, and its way. out_features: valid columns; paired: panels of the first and of the second half of the columns
// in turn.
struct Linear {
  const void* panels;
  const float* scales;
  const int32_t* offsets;
  const float* bias;
  const int64_t* places;
  int64_t in_features;
  int64_t out_features;
  Weights weights;
  int32_t paired;
};
static_assert(sizeof(Linear) == 64);

// x [rows, in_features] to out [rows, out_features]; strides in elements, here and everywhere.
struct LinearCall {
  const Linear* weights;
  const void* x;
  void* out;
  int64_t x_stride;
  int64_t out_stride;
  Out mode;
  Activation act;
};
static_assert(sizeof(LinearCall) == 48);

// x [rows, width] to out: RMSNorm, or LayerNorm with `center`, which then has a bias.
struct NormCall {
  const float* x;
  const float* weight;
  const float* bias;
  void* out;
  int64_t width;
  int32_t center;
  float epsilon;
};
static_assert(sizeof(NormCall) == 48);

// Turns the first heads of each row in place, halves against halves; cosine and sine [rows, dim]. q_norm and k_norm
// [dim], or null, are RMSNorms of the first `queries` heads and of the rest.
struct RotateCall {
  void* x;
  const float* cosine;
  const float* sine;
  const float* q_norm;
  const float* k_norm;
  int64_t stride;
  int64_t heads;
  int64_t queries;
  int64_t dim;
  float epsilon;
};
static_assert(sizeof(RotateCall) == 80);

// A decode step: query, key, value [sequences, heads, dim]; keys and values are pools [blocks, block_size, kv_heads,
// dim]; out [sequences, heads, value_dim]. window: latest tokens seen, 0: all.
struct AttentionCall {
  const void* query;
  const void* key;
  const void* value;
  int64_t query_stride;
  int64_t key_stride;
  int64_t value_stride;
  void* keys;
  void* values;
  void* out;
  int64_t heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t block_size;
  int64_t window;
  float scale;
};
static_assert(sizeof(AttentionCall) == 128);

// The first place of the largest number of each row of x [rows, width].
struct ArgmaxCall {
  const void* x;
  int64_t* out;
  int64_t width;
};
static_assert(sizeof(ArgmaxCall) == 24);

// value [rows, width_out] += factor f(source down + bias) up in the rows of each of `count` spans; source [rows,
// width_in], may be value. wide: float, whatever the matrices are.
struct LowRankCall {
  void* value;
  const void* source;
  const LowRankSpan* spans;
  int64_t count;
  int64_t value_stride;
  int64_t source_stride;
  int64_t width_in;
  int64_t width_out;
  int64_t layer;
  int32_t relu;
  int32_t wide_value;
  int32_t wide_source;
};
static_assert(sizeof(LowRankCall) == 88);

// x [rows, width] *= 1 + v in the rows whose sequence has a vector v at this site. wide: x is float, whatever the
// vectors are.
struct ScaleCall {
  void* x;
  int64_t stride;
  int64_t width;
  int64_t site;
  int64_t layer;
  int32_t wide;
};
static_assert(sizeof(ScaleCall) == 48);

// x [rows, width] to out = act(x), or gated: x [rows, 2 width] to act(first half) * second half. wide: x is float,
// whatever out is.
struct ActivateCall {
  const void* x;
  void* out;
  int64_t width;
  Activation act;
  int32_t gated;
  int32_t wide;
};
static_assert(sizeof(ActivateCall) == 40);

// A prompt pass: query, key, value [rows, heads, dim]; keys and values are pools [slots, kv_heads, dim], null if no
// span has stored tokens; out [rows, heads, value_dim]. window as above; scale is positive.
struct PromptCall {
  const void* query;
  const void* key;
  const void* value;
  const void* keys;
  const void* values;
  void* out;
  const PromptSpan* spans;
  int64_t count;
  int64_t query_stride;
  int64_t key_stride;
  int64_t value_stride;
  int64_t heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t window;
  float scale;
};
static_assert(sizeof(PromptCall) == 136);

// x [rows, width] = x gain + shift in rows [start, stop) of each of bounds [count, 2]; gains and shifts, either of
// which may be null: addresses [count] of vectors [layers, width].
struct AffineCall {
  void* x;
  const int64_t* bounds;
  const float* const* gains;
  const float* const* shifts;
  int64_t count;
  int64_t stride;
  int64_t width;
  int64_t layer;
};
static_assert(sizeof(AffineCall) == 64);

// out [count, width]: the means of x's rows [start, stop) of bounds [count, 2], none of them empty.
struct MeanCall {
  const void* x;
  void* out;
  const int64_t* bounds;
  int64_t count;
  int64_t stride;
  int64_t width;
};
static_assert(sizeof(MeanCall) == 48);

// Calls body with an operation's arguments, as what they are.
template <class Body>
void with_arguments(Kind kind, const void* arguments, const Body& body) {
  switch (kind) {
    case Kind::linear:
      return body(*static_cast<const LinearCall*>(arguments));
    case Kind::norm:
      return body(*static_cast<const NormCall*>(arguments));
    case Kind::rotate:
      return body(*static_cast<const RotateCall*>(arguments));
    case Kind::attention:
      return body(*static_cast<const AttentionCall*>(arguments));
    case Kind::argmax:
      return body(*static_cast<const ArgmaxCall*>(arguments));
    case Kind::low_rank:
      return body(*static_cast<const LowRankCall*>(arguments));
    case Kind::scale:
      return body(*static_cast<const ScaleCall*>(arguments));
    case Kind::activate:
      return body(*static_cast<const ActivateCall*>(arguments));
    case Kind::prompt:
      return body(*static_cast<const PromptCall*>(arguments));
    case Kind::affine:
      return body(*static_cast<const AffineCall*>(arguments));
    case Kind::mean:
      return body(*static_cast<const MeanCall*>(arguments));
  }
}

inline constexpr char kDeclared[] = "13b8849b068ebf65";
