"""What the kernels can do, and what each operation is given: declared here and nowhere else.

`operations.h` is made of this file: after a change `python -m deploy.kernel_header`. An operation is a
class with its arguments, a line in `kernels.cpp` with what computes it, and a method of `Calls`.
"""

from enum import IntEnum
from typing import Annotated, ClassVar

from prad.lm.kernels.declared import Memory, Struct, struct

Given = Annotated[Memory, "const void*"]
Result = Annotated[Memory, "void*"]
Floats = Annotated[Memory, "const float*"]
Places = Annotated[Memory, "const int64_t*"]
Size = Annotated[int, "int64_t"]
Flag = Annotated[bool, "int32_t"]
Real = Annotated[float, "float"]


class Weights(IntEnum):
    """How a layer's weights are kept (linear.h); from fours on in blocks of 32 inputs (blocks.h), mixed: each
    panel in its own way."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    FOURS = 3
    EIGHTS = 4
    K_FOURS = 5
    K_SIXES = 6
    MIXED = 7


class Out(IntEnum):
    """What becomes of a linear layer's result: stored in the activations' dtype, added to float32 rows,
    columns in pairs as act(first half) * second half, or stored in float32 as it was summed, without an
    activation."""

    STORE = 0
    ADD = 1
    GATED = 2
    WIDE = 3


class Activation(IntEnum):
    """f of a linear layer, or alone."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3


class Kind(IntEnum):
    """The operations."""

    LINEAR = 0
    NORM = 1
    ROTATE = 2
    ATTENTION = 3
    ARGMAX = 4
    LOW_RANK = 5
    SCALE = 6
    ACTIVATE = 7
    PROMPT = 8
    AFFINE = 9
    MEAN = 10


@struct
class Call(Struct):
    """One of a list of calls; half: the activations are bfloat16, else float."""

    kind: Kind
    half: Flag
    arguments: Given


@struct
class PagedView(Struct):
    """Where a step's sequences lie, for all layers: block table [sequences, width], and lengths [sequences]
    with the new token; and their request state, for `scale`: addresses [sites, sequences] of vectors
    [layers, width of the site], 0 for none. drafted: whether some sequences are one with a draft behind it,
    which see each other's new tokens."""

    table: Places
    lengths: Places
    width: Size
    vectors: Annotated[Memory, "const void* const*"]
    drafted: Flag


@struct
class LowRankSpan(Struct):
    """Rows [start, stop) with matrices of their own: down [layers, width_in, r], bias [layers, r] or null,
    up [layers, r, width_out]."""

    start: Size
    stop: Size
    down: Given
    bias: Floats
    up: Given
    r: Size
    factor: Real


@struct
class PromptSpan(Struct):
    """A sequence: rows [start, start + rows) of a pass, behind tokens that lie at slots [stored] of the
    pools. answered: how many rows, from the last one back, a decode step has computed before."""

    start: Size
    rows: Size
    slots: Places
    stored: Size
    answered: Size


@struct
class Linear(Struct):
    """A linear layer's weights; all in the order of the panels' columns. int8 has a scale for each, and
    what its sums are too large by where rows have 128 added. bias: or null. places: of mixed weights, for
    each panel at which byte it begins, and its way. out_features: valid columns; paired: panels of the first
    and of the second half of the columns in turn."""

    panels: Given
    scales: Floats
    offsets: Annotated[Memory, "const int32_t*"]
    bias: Floats
    places: Places
    in_features: Size
    out_features: Size
    weights: Weights
    paired: Flag


class Operation(Struct):
    """The arguments of one."""

    kind: ClassVar[Kind]


@struct
class LinearCall(Operation):
    """x [rows, in_features] to out [rows, out_features]; strides in elements, here and everywhere."""

    kind = Kind.LINEAR
    weights: Annotated[Memory, "const Linear*"]
    x: Given
    out: Result
    x_stride: Size
    out_stride: Size
    mode: Out
    act: Activation


@struct
class NormCall(Operation):
    """x [rows, width] to out: RMSNorm, or LayerNorm with `center`, which then has a bias."""

    kind = Kind.NORM
    x: Floats
    weight: Floats
    bias: Floats
    out: Result
    width: Size
    center: Flag
    epsilon: Real


@struct
class RotateCall(Operation):
    """Turns the first heads of each row in place, halves against halves; cosine and sine [rows, dim].
    q_norm and k_norm [dim], or null, are RMSNorms of the first `queries` heads and of the rest."""

    kind = Kind.ROTATE
    x: Result
    cosine: Floats
    sine: Floats
    q_norm: Floats
    k_norm: Floats
    stride: Size
    heads: Size
    queries: Size
    dim: Size
    epsilon: Real


@struct
class AttentionCall(Operation):
    """A decode step: query, key, value [sequences, heads, dim]; keys and values are pools [blocks,
    block_size, kv_heads, dim]; out [sequences, heads, value_dim]. window: latest tokens seen, 0: all."""

    kind = Kind.ATTENTION
    query: Given
    key: Given
    value: Given
    query_stride: Size
    key_stride: Size
    value_stride: Size
    keys: Result
    values: Result
    out: Result
    heads: Size
    kv_heads: Size
    key_dim: Size
    value_dim: Size
    block_size: Size
    window: Size
    scale: Real


@struct
class ArgmaxCall(Operation):
    """The first place of the largest number of each row of x [rows, width]."""

    kind = Kind.ARGMAX
    x: Given
    out: Annotated[Memory, "int64_t*"]
    width: Size


@struct
class LowRankCall(Operation):
    """value [rows, width_out] += factor f(source down + bias) up in the rows of each of `count` spans;
    source [rows, width_in], may be value. wide: float, whatever the matrices are."""

    kind = Kind.LOW_RANK
    value: Result
    source: Given
    spans: Annotated[Memory, "const LowRankSpan*"]
    count: Size
    value_stride: Size
    source_stride: Size
    width_in: Size
    width_out: Size
    layer: Size
    relu: Flag
    wide_value: Flag
    wide_source: Flag


@struct
class ScaleCall(Operation):
    """x [rows, width] *= 1 + v in the rows whose sequence has a vector v at this site. wide: x is float,
    whatever the vectors are."""

    kind = Kind.SCALE
    x: Result
    stride: Size
    width: Size
    site: Size
    layer: Size
    wide: Flag


@struct
class ActivateCall(Operation):
    """x [rows, width] to out = act(x), or gated: x [rows, 2 width] to act(first half) * second half. wide:
    x is float, whatever out is."""

    kind = Kind.ACTIVATE
    x: Given
    out: Result
    width: Size
    act: Activation
    gated: Flag
    wide: Flag


@struct
class PromptCall(Operation):
    """A prompt pass: query, key, value [rows, heads, dim]; keys and values are pools [slots, kv_heads,
    dim], null if no span has stored tokens; out [rows, heads, value_dim]. window as above; scale is
    positive."""

    kind = Kind.PROMPT
    query: Given
    key: Given
    value: Given
    keys: Given
    values: Given
    out: Result
    spans: Annotated[Memory, "const PromptSpan*"]
    count: Size
    query_stride: Size
    key_stride: Size
    value_stride: Size
    heads: Size
    kv_heads: Size
    key_dim: Size
    value_dim: Size
    window: Size
    scale: Real


@struct
class AffineCall(Operation):
    """x [rows, width] = x gain + shift in rows [start, stop) of each of bounds [count, 2]; gains and
    shifts, either of which may be null: addresses [count] of vectors [layers, width]."""

    kind = Kind.AFFINE
    x: Result
    bounds: Places
    gains: Annotated[Memory, "const float* const*"]
    shifts: Annotated[Memory, "const float* const*"]
    count: Size
    stride: Size
    width: Size
    layer: Size


@struct
class MeanCall(Operation):
    """out [count, width]: the means of x's rows [start, stop) of bounds [count, 2], none of them empty."""

    kind = Kind.MEAN
    x: Given
    out: Result
    bounds: Places
    count: Size
    stride: Size
    width: Size
