"""Every kernel against the same computation written out in torch, around the edges of tiles and blocks."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, relu, silu

from prad.core.kv import KVLayout, LayerKV
from prad.lm.attention import causal_attention, prompt_spans
from prad.lm.kernels import (
    Activation,
    BuildError,
    Kernels,
    LowRankSpan,
    Out,
    PackedLinear,
    PagedView,
    Precision,
    load_kernels,
)
from prad.lm.kernels.build import built
from prad.lm.kv import Pools, dtype_name
from tests.conftest import CACHE

ROWS = (1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 257)
SIZES = ((48, 64), (50, 96), (96, 32), (720, 160))  # columns: whole panels or not, an odd number of them
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # tolerance, of the largest result
MIXED = [  # matrices; whether value, and source, are float32 beside them
    (torch.float32, False, False),
    (torch.bfloat16, False, False),
    (torch.bfloat16, True, False),
    (torch.bfloat16, True, True),
]
ACTIVATIONS = {
    Activation.NONE: lambda x: x,
    Activation.SILU: silu,
    Activation.GELU_TANH: lambda x: gelu(x, approximate="tanh"),
    Activation.RELU: relu,
}


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.float(), expected.float(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(kernels: Kernels, dtype: torch.dtype, columns: int, depth: int, rows: int) -> None:
    x, weight, bias = some(rows, depth, dtype=dtype), some(columns, depth, dtype=dtype, seed=1), some(columns)
    expected = x.float() @ weight.float().T + bias
    packed = PackedLinear.of(weight, bias)
    out = torch.full((rows + 1, columns), 7.0, dtype=dtype)
    kernels.linear(packed, x, out[:rows], Out.STORE)
    assert_near(out[:rows], expected, DTYPES[dtype])
    assert (out[rows] == 7).all(), "a row beyond the batch was written"
    summed = some(rows, columns, seed=2)
    before = summed.clone()
    kernels.linear(packed, x, summed, Out.ADD)
    assert_near(summed, before + expected, 1e-5)  # products of bfloat16 are exact in float32
    wide = torch.full((rows + 1, columns), 7.0)
    kernels.linear(packed, x, wide[:rows], Out.WIDE)
    assert_near(wide[:rows], expected, 1e-5)
    assert (wide[rows] == 7).all(), "a row beyond the batch was written"


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("depth", [96, 4128])  # more inputs than are taken at once, too
def test_a_row_has_the_same_products_alone_and_in_any_batch(
    kernels: Kernels, depth: int, precision: Precision
) -> None:
    """Bit for bit: what is drawn must not depend on who else is served."""
    x, weight = some(300, depth, dtype=torch.bfloat16), some(336, depth, dtype=torch.bfloat16, seed=1)
    packed = PackedLinear.of(weight, precision=precision)
    alone = torch.cat([_wide(kernels, packed, row[None]) for row in x])
    for rows in (*range(2, 28), *ROWS[4:]):
        assert torch.equal(_wide(kernels, packed, x[:rows]), alone[:rows]), rows
        assert torch.equal(_wide(kernels, packed, x[-rows:]), alone[-rows:]), rows


def _wide(kernels: Kernels, packed: PackedLinear, x: Tensor) -> Tensor:
    out = torch.empty(len(x), packed.out_features)
    kernels.linear(packed, x, out, Out.WIDE)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [3, 32, 65])
def test_gated_linear(kernels: Kernels, dtype: torch.dtype, activation: Activation, rows: int) -> None:
    x, weight, bias = some(rows, 64, dtype=dtype), some(2 * 40, 64, dtype=dtype, seed=1), some(80)
    gate, up = (x.float() @ weight.float().T + bias).chunk(2, dim=1)
    packed = PackedLinear.of(weight, bias, paired=True)
    both = torch.empty(rows, 80, dtype=dtype)
    kernels.linear(packed, x, both, Out.STORE)
    assert_near(both, torch.cat((gate, up), dim=1), DTYPES[dtype])
    if activation is not Activation.NONE:
        inner = torch.empty(rows, 40, dtype=dtype)
        kernels.linear(packed, x, inner, Out.GATED, activation)
        assert_near(inner, ACTIVATIONS[activation](gate) * up, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("width", [16, 40, 7])
def test_activation_alone(kernels: Kernels, dtype: torch.dtype, activation: Activation, width: int) -> None:
    x, out = some(9, 2 * width, dtype=dtype), torch.full((10, width), 7.0, dtype=dtype)
    gate, up = x.float().chunk(2, dim=1)
    kernels.activate(x, out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate) * up, DTYPES[dtype])
    kernels.activate(gate.to(dtype).contiguous(), out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate), DTYPES[dtype])
    kernels.activate(x.float(), out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate) * up, DTYPES[dtype])
    assert (out[9] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 7])
def test_rows_are_scaled_by_their_own_vectors(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    layers, rows, site, layer = 3, 19, 1, 2
    vectors = {i: some(layers, width, dtype=dtype, seed=i) for i in range(0, rows, 3)}
    addresses = torch.zeros(2, rows, dtype=torch.long)
    for i, own in vectors.items():
        addresses[site, i] = own.data_ptr()
    nothing = torch.zeros(1, 1, dtype=torch.long)
    whole = some(rows, width + 5, dtype=dtype, seed=99)
    expected = whole.float()
    for i, own in vectors.items():
        expected[i, 2 : 2 + width] *= 1 + own[layer].float()
    view, wide = PagedView.of(nothing, nothing, addresses), whole.float()
    kernels.scale(whole[:, 2 : 2 + width], site, layer, view, dtype)
    assert_near(whole, expected, DTYPES[dtype])
    kernels.scale(wide[:, 2 : 2 + width], site, layer, view, dtype)
    assert_near(wide, expected, DTYPES[torch.float32])


@pytest.mark.parametrize("rows", ROWS)
def test_linear_with_eight_bits(kernels: Kernels, rows: int) -> None:
    x, weight = some(rows, 96, dtype=torch.bfloat16), some(80, 96, dtype=torch.bfloat16, seed=1)
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight.float() / scale).round() * scale
    out = torch.zeros(rows, 80)
    kernels.linear(PackedLinear.of(weight, precision="int8"), x, out, Out.ADD)
    assert_near(out, x.float() @ rounded.T, 1e-5)
    assert not torch.allclose(out, x.float() @ weight.float().T, atol=1e-3), "nothing was rounded"
    wide = torch.empty(rows, 80)
    kernels.linear(PackedLinear.of(weight, precision="int8"), x, wide, Out.WIDE)
    assert torch.equal(wide, out), "added to zeros is not what is written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 64, 100])
def test_norms(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x, weight, bias = 3 * some(19, width) + 1, some(width, seed=1), some(width, seed=2)
    out = torch.empty(19, width, dtype=dtype)
    kernels.norm(x, weight, None, False, 1e-5, out)
    assert_near(out, x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight, DTYPES[dtype])
    kernels.norm(x, weight, bias, True, 1e-5, out)
    assert_near(out, layer_norm(x, (width,), weight, bias, 1e-5), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation(kernels: Kernels, dtype: torch.dtype, normed: bool) -> None:
    heads, queries, dim, rows = 5, 3, 8, 21
    x = some(rows, (heads + 2) * dim, dtype=dtype)
    angles = some(rows, dim // 2, seed=1).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    norms = (some(dim, seed=2), some(dim, seed=3)) if normed else None
    expected = x.float().view(rows, heads + 2, dim).clone()
    turned = expected[:, :heads]
    if norms is not None:
        weights = torch.stack([norms[0]] * queries + [norms[1]] * (heads - queries))
        turned = turned * (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights
    half = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    expected[:, :heads] = turned * cosine[:, None] + half * sine[:, None]
    kernels.rotate(x, heads, queries, dim, cosine, sine, norms, 1e-6)
    assert_near(x, expected.flatten(1), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_takes_the_lowest_of_a_tie(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = some(4, 50, dtype=dtype)
    logits[1, [7, 33, 49]] = 9.0
    logits[2, [48, 49]] = 9.0
    logits[3] = float("-inf")
    assert kernels.argmax(logits) == [int(logits[0].argmax()), 7, 48, 0]
    wide = torch.zeros(3, 50_000, dtype=dtype)
    wide[0, [41_000, 17, 30_000]] = 4.0
    wide[1, [49_999, 49_998]] = 1.0
    assert kernels.argmax(wide) == [17, 49_998, 0]


@pytest.mark.parametrize(("dtype", "wide_value", "wide_source"), MIXED)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("width_in", "width_out"), [(48, 64), (50, 21)])
def test_low_rank(
    kernels: Kernels,
    dtype: torch.dtype,
    wide_value: bool,
    wide_source: bool,
    relu: bool,
    width_in: int,
    width_out: int,
) -> None:
    """Spans of several ranks, with and without a bias."""
    layers, layer, rows = 3, 1, 40
    source = some(rows, width_in + 3, dtype=torch.float32 if wide_source else dtype)[:, :width_in]
    value = some(rows, width_out + 5, dtype=torch.float32 if wide_value else dtype, seed=8)[:, :width_out]
    expected = value.float().clone()
    spans, kept = [], []
    for seed, (start, stop, r, factor) in enumerate([(0, 1, 4, 1.0), (2, 11, 16, 0.5), (11, 40, 37, -2.0)]):
        down, up = (some(layers, *shape, dtype=dtype, seed=seed) for shape in ((width_in, r), (r, width_out)))
        bias = some(layers, r, dtype=torch.float32, seed=9) if seed else None
        kept += [down, up, bias]
        pointers = (down.data_ptr(), None if bias is None else bias.data_ptr(), up.data_ptr())
        spans.append(LowRankSpan(start, stop, *pointers, r, factor))
        hidden = source[start:stop].float() @ down[layer].float()
        if bias is not None:
            hidden = hidden + bias[layer]
        expected[start:stop] += factor * (relu_or_not(hidden, relu) @ up[layer].float())
    kernels.low_rank(value, source, (LowRankSpan * len(spans))(*spans), layer, relu, dtype)
    assert_near(value, expected, DTYPES[value.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_reads_what_it_writes(kernels: Kernels, dtype: torch.dtype) -> None:
    value, down, up = (
        some(21, 48, dtype=dtype),
        some(1, 48, 8, dtype=dtype, seed=1),
        some(1, 8, 48, dtype=dtype, seed=2),
    )
    expected = value.float() + (value.float() @ down[0].float()) @ up[0].float()
    span = LowRankSpan(0, 21, down.data_ptr(), None, up.data_ptr(), 8, 1.0)
    kernels.low_rank(value, value, (LowRankSpan * 1)(span), 0, False, dtype)
    assert_near(value, expected, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 16, 50])
def test_affine(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    """Pieces with vectors of their own; rows in none stay, and so does what lies beside."""
    layers, layer, bounds = 3, 2, torch.tensor([[1, 2], [4, 20], [20, 33]])
    beside = some(40, width + 5, dtype=dtype)
    x = beside[:, :width]
    vectors = [some(layers, width, dtype=torch.float32, seed=seed) for seed in range(10, 16)]
    gains, shifts = vectors[:3], vectors[3:]
    for by_gain, by_shift in ((True, False), (False, True), (True, True)):
        expected = beside.float().clone()
        for (start, stop), gain, shift in zip(bounds.tolist(), gains, shifts, strict=True):
            if by_gain:
                expected[start:stop, :width] *= gain[layer]
            if by_shift:
                expected[start:stop, :width] += shift[layer]
        at = [torch.tensor([v.data_ptr() for v in own]) for own in (gains, shifts)]
        kernels.affine(x, bounds, at[0] if by_gain else None, at[1] if by_shift else None, layer)
        assert_near(beside, expected, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 16, 50])
def test_mean(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    beside, bounds = some(70, width + 5, dtype=dtype), torch.tensor([[0, 1], [3, 67], [60, 70]])
    out = torch.empty(3, width, dtype=dtype)
    kernels.mean(beside[:, :width], bounds, out)
    expected = [beside[start:stop, :width].double().mean(0) for start, stop in bounds.tolist()]
    assert_near(out, torch.stack(expected), DTYPES[dtype])


def relu_or_not(x: Tensor, wanted: bool) -> Tensor:
    return relu(x) if wanted else x


LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 100)


PROMPTS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 600)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 40, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(6, 2, 64, 64), (2, 1, 128, 128), (4, 4, 16, 16), (6, 2, 24, 12), (2, 1, 5, 7)],
)
@pytest.mark.parametrize("going_on", [False, True])
def test_prompt_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    going_on: bool,
) -> None:
    """Equals each sequence's attention alone in float64, some of them behind tokens that lie in pools."""
    shapes = ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    query, key, value = (some(sum(PROMPTS), *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    pools = (
        some(900, kv_heads, key_dim, dtype=dtype, seed=3),
        some(900, kv_heads, value_dim, dtype=dtype, seed=4),
    )
    places = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    contexts = {i: places[: 41 * i + 1] for i in range(0, len(PROMPTS), 2)} if going_on else {}
    spans = prompt_spans(PROMPTS, contexts)  # not `causal_attention`, which leaves some to torch
    found = kernels.prompt_attention(query, key, value, spans, pools, 0.3, window)
    parts = zip(*(x.double().split(PROMPTS) for x in (query, key, value)), strict=True)
    for i, ((q, k, v), ours) in enumerate(zip(parts, found.split(PROMPTS), strict=True)):
        if i in contexts:
            k, v = (torch.cat((pool.double()[contexts[i]], x)) for pool, x in zip(pools, (k, v), strict=True))
        assert_near(ours, one_sequence(q, k, v, 0.3, window), 2 * DTYPES[dtype])


def one_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """The last queries of a sequence over all its keys, written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    at, query_at = torch.arange(len(key)), torch.arange(len(key) - len(query), len(key))[:, None]
    seen = (at <= query_at) & (at > query_at - (window or len(key)))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


def test_prompts_of_others_stay_theirs(kernels: Kernels) -> None:
    """NaN of a neighbour, on either side, reach nobody else."""
    lengths = (20, 33, 40)
    states = [some(sum(lengths), n, 32, seed=n) for n in (4, 2, 2)]
    attention = causal_attention(lengths, kernels=kernels)
    before = attention.attend(states[0], states[1], states[2], 0.5, None)
    for x in states:
        x[:20] = x[53:] = torch.nan
    after = attention.attend(states[0], states[1], states[2], 0.5, None)
    assert torch.equal(after[20:53], before[20:53])
    assert after[:20].isnan().all()


@pytest.mark.parametrize("fast", [False, True])
def test_torch_computes_what_does_not_suit_the_kernels(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """bfloat16 on a CPU that does not multiply it, and what wants a gradient; the results agree."""
    monkeypatch.setattr(kernels, "multiplies_bf16", fast)
    monkeypatch.setattr(kernels, "prompt_attention", None if not fast else kernels.prompt_attention)
    states = [some(sum(PROMPTS), n, 32, dtype=torch.bfloat16, seed=n) for n in (4, 2, 2)]
    pools = some(300, 2, 32, dtype=torch.bfloat16, seed=5), some(300, 2, 32, dtype=torch.bfloat16, seed=6)
    contexts = {3: torch.arange(40, 90), 12: torch.arange(200)}
    found, expected = (
        causal_attention(PROMPTS, contexts=contexts, kernels=own).attend(
            states[0], states[1], states[2], 0.5, None, pools
        )
        for own in (kernels, None)
    )
    assert_near(found, expected, 4 * DTYPES[torch.bfloat16])
    states[0].requires_grad_()
    out = causal_attention(PROMPTS, kernels=kernels).attend(states[0], states[1], states[2], 0.5, None)
    assert out.requires_grad


@pytest.mark.parametrize("threads", [1, 5])
def test_prompt_attention_with_any_number_of_threads(kernels: Kernels, threads: int) -> None:
    states = [some(sum(PROMPTS), n, 32, seed=n) for n in (4, 2, 2)]
    results = [
        causal_attention(PROMPTS, kernels=own).attend(states[0], states[1], states[2], 0.5, None)
        for own in (kernels, Kernels(built(CACHE), threads))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 16, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(9, 3, 64, 64), (8, 2, 128, 128), (4, 4, 16, 16), (8, 1, 8, 8), (10, 2, 80, 80), (6, 2, 24, 12)],
)
@pytest.mark.parametrize("block_size", [16, 5])
def test_paged_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block_size: int,
) -> None:
    """Equals torch's gathered attention, whatever lies in the rest of the blocks."""
    layout = KVLayout((LayerKV(kv_heads, key_dim, value_dim),), dtype_name(dtype))
    blocks = iter(torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist())
    batch: list[Any] = [
        SimpleNamespace(blocks=[next(blocks) for _ in range(n // block_size + 1)], kv_len=n - 1)
        for n in LENGTHS
    ]
    results = []
    for own in (None, kernels):
        pools = Pools(layout, 200, block_size, "cpu", own)
        pools.keys[0].copy_(some(*pools.keys[0].shape, seed=1))
        pools.values[0].copy_(some(*pools.values[0].shape, seed=2))
        if own is not None:
            _spoil_what_is_not_written(pools, batch)
        step = pools.step(batch)
        query, key, value = (
            some(len(batch), n, dim, dtype=dtype, seed=seed)
            for seed, (n, dim) in enumerate(((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)))
        )
        results.append(step.attend(0, query, key, value, 0.3, window))
    assert_near(results[1], results[0], 4 * DTYPES[dtype])


def _spoil_what_is_not_written(pools: Pools, batch: list[Any]) -> None:
    written = torch.zeros(pools.keys[0].shape[:2], dtype=torch.bool)
    for sequence in batch:
        for token in range(sequence.kv_len):
            written[sequence.blocks[token // pools.block_size], token % pools.block_size] = True
    for pool in (pools.keys[0], pools.values[0]):
        pool[~written] = float("nan")


def test_one_thread_equals_two(kernels: Kernels, tmp_path: Path) -> None:
    x, packed = some(70, 64), PackedLinear.of(some(480, 64, seed=1))
    results = []
    for threads in (1, 2, 3):
        out = torch.empty(70, 480)
        Kernels(built(CACHE), threads).linear(packed, x, out, Out.STORE)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_with_any_number_of_threads(threads: int) -> None:
    """A thread takes a sequence, or a head of one where there are few."""
    layout = KVLayout((LayerKV(2, 32, 32),), "float32")
    batch: list[Any] = [SimpleNamespace(blocks=[i], kv_len=i) for i in range(12)]
    results = []
    for own in (None, Kernels(built(CACHE), threads)):
        pools = Pools(layout, 12, 16, "cpu", own)
        pools.keys[0].copy_(some(*pools.keys[0].shape, seed=1))
        pools.values[0].copy_(some(*pools.values[0].shape, seed=2))
        query, key, value = (some(12, n, 32, seed=n) for n in (6, 2, 2))
        results.append(pools.step(batch).attend(0, query, key, value, 0.3, None))
    assert_near(results[1], results[0], 1e-5)


def test_without_a_compiler_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert load_kernels("auto", tmp_path, "cpu") is None
    with pytest.raises(BuildError, match="did not build"):
        load_kernels("native", tmp_path, "cpu")


def test_a_compiler_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "cxx"
    refusing.write_text("#!/bin/sh\necho 'error: no such standard' >&2\nexit 1\n", encoding="utf-8")
    refusing.chmod(0o755)
    assert subprocess.run([refusing], capture_output=True).returncode == 1
    monkeypatch.setenv("CXX", str(refusing))
    with pytest.raises(BuildError, match="no such standard"):
        load_kernels("native", tmp_path, "cpu")


def test_libraries_of_older_sources_go_least_recently_used_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor out; do :; done\necho library > "$out"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    kept = built(tmp_path)
    ages = {"a.so": 3, "a.lock": 3, "b.so": 2, "b.lock": 2, "c.new": 1}
    for name, used in ages.items():
        (kept.parent / name).write_bytes(bytes(100))
        os.utime(kept.parent / name, (used, used))
    fresh = kept.parent / "fresh.so"
    fresh.write_bytes(bytes(100))
    os.utime(kept, (0, 0))
    assert built(tmp_path, 250) == kept
    there = {path.name for path in kept.parent.iterdir()} - {kept.name, kept.with_suffix(".lock").name}
    assert there == {"a.so", "a.lock", "fresh.so"}
    built(tmp_path, 0)
    assert fresh.exists(), "another process may be about to load it"
    assert kept.exists()
    assert not (kept.parent / "a.so").exists()
