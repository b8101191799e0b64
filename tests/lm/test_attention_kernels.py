"""The attention kernels against the same written out in torch, around the edges of tiles and blocks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from near import DTYPES, EACH_KIND, assert_near, each_kind, some
from torch import Tensor

from prad.core.kv import KVLayout, LayerKV
from prad.lm.attention import causal_attention, prompt_spans
from prad.lm.kernels import Kernels
from prad.lm.kernels.build import built
from prad.lm.kv import Pools, dtype_name
from tests.cache import CACHE

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100)
PROMPTS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 600)


@each_kind("window", [None, 5, 40, 256], few=[40])
@pytest.mark.parametrize("dtype", DTYPES)
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


@EACH_KIND
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


def test_torch_computes_what_wants_a_gradient_and_agrees(kernels: Kernels) -> None:
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


@each_kind("window", [None, 5, 16, 40], few=[40])
@pytest.mark.parametrize("dtype", DTYPES)
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


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 24), (2, 1, 5)])
@pytest.mark.parametrize("window", [None, 5, 40, 300])
def test_chunks_of_a_prompt_have_its_bits(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    query, key, value = (some(600, n, dim, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads))
    whole = kernels.prompt_attention(query, key, value, prompt_spans([600], {}), None, 0.3, window)
    for start, end in ((1, 17), (15, 16), (31, 96), (63, 128), (250, 600)):
        context = {0: torch.arange(start)}
        spans = prompt_spans([end - start], context)
        q, k, v = (x[start:end] for x in (query, key, value))
        later = kernels.prompt_attention(q, k, v, spans, (key, value), 0.3, window)
        assert torch.equal(later, whole[start:end])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(9, 3, 64, 64), (10, 2, 24, 12), (2, 1, 5, 7)]
)
@pytest.mark.parametrize("window", [None, 5, 40, 550])
def test_answered_tokens_have_the_bits_of_their_steps(
    kernels: Kernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None,
) -> None:
    """Whatever is before them in the pass, and in whatever chunks; others keep theirs."""
    tokens, given = 600, 490
    shapes = ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    query, key, value = (some(tokens, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    layout = KVLayout((LayerKV(kv_heads, key_dim, value_dim),), dtype_name(dtype))
    pools = Pools(layout, 40, 16, "cpu", kernels)
    table = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    slots = pools.slots(table, tokens)
    for pool, states in ((pools.keys[0], key), (pools.values[0], value)):
        pool.flatten(0, 1)[slots] = states
    batch: list[Any] = [SimpleNamespace(blocks=table, kv_len=at) for at in range(given, tokens)]
    steps = torch.cat(
        [
            pools.step([each]).attend(
                0, *(x[each.kv_len : each.kv_len + 1] for x in (query, key, value)), 0.3, window
            )
            for each in batch
        ]
    )
    plain = kernels.prompt_attention(query, key, value, prompt_spans([tokens], {}), None, 0.3, window)
    if dtype is torch.float32:  # else rounding may hide it
        assert not torch.equal(plain[given:], steps), "both ways are one: nothing is shown here"
    spans = prompt_spans([tokens], {}, [tokens - given])
    whole = kernels.prompt_attention(query, key, value, spans, None, 0.3, window)
    assert torch.equal(whole[:given], plain[:given])
    assert torch.equal(whole[given:], steps)
    for start, end in ((400, 520), (490, 491), (511, 600)):
        spans = prompt_spans([7, end - start], {1: slots[:start]}, [3, end - max(start, given)])
        q, k, v = (torch.cat((x[:7], x[start:end])) for x in (query, key, value))
        stored = (pools.keys[0].flatten(0, 1), pools.values[0].flatten(0, 1))
        found = kernels.prompt_attention(q, k, v, spans, stored, 0.3, window)[7:]
        assert torch.equal(found, whole[start:end])


@each_kind("window", [None, 40, 700], few=[None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (6, 2, 24)])
@pytest.mark.parametrize(("block_size", "blocks"), [(16, 1), (16, 7), (16, 40), (5, 1), (5, 120)])
def test_a_step_has_the_bits_of_each_sequence_alone(
    kernels: Kernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    block_size: int,
    blocks: int,
) -> None:
    """Sequences of many lengths: ten share their first blocks, two others theirs, one none; in no order."""
    numbers = iter(torch.randperm(2000, generator=torch.Generator().manual_seed(0)).tolist())
    begins = [[next(numbers) for _ in range(blocks)] for _ in range(3)]
    extra = (0, 1, 15, 16, 17, 40, 2, 63, 64, 300, 5, 6, 65)
    batch: list[Any] = [
        SimpleNamespace(
            blocks=[*begins[begin], *(next(numbers) for _ in range(more // block_size + 1))],
            kv_len=blocks * block_size + more,
        )
        for begin, more in zip((0, 1, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0), extra, strict=True)
    ]
    states = [some(len(batch), n, dim, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads)]
    layout = KVLayout((LayerKV(kv_heads, dim, dim),), dtype_name(dtype))
    pools = Pools(layout, 2000, block_size, "cpu", kernels)
    pools.keys[0].copy_(some(*pools.keys[0].shape, seed=1))
    pools.values[0].copy_(some(*pools.values[0].shape, seed=2))
    together = pools.step(batch).attend(0, states[0], states[1], states[2], 0.3, window)
    for i, sequence in enumerate(batch):
        q, k, v = (x[i : i + 1] for x in states)
        assert torch.equal(pools.step([sequence]).attend(0, q, k, v, 0.3, window), together[i : i + 1])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("denormals")
def test_weights_that_are_denormals_and_a_sequence_of_nan(kernels: Kernels, dtype: torch.dtype) -> None:
    """exp(-80) to exp(-100) of the largest, in steps and in prompts; NaN stay in their own sequence."""
    layout = KVLayout((LayerKV(1, 16, 16),), dtype_name(dtype))
    batch: list[Any] = [SimpleNamespace(blocks=[i], kv_len=15) for i in range(5)]
    query, value = torch.ones(5, 2, 16, dtype=dtype), some(5, 1, 16, dtype=dtype)
    keys = torch.linspace(-100, -80, 16)[None, :, None, None].expand(5, 16, 1, 16) / 16
    results = []
    for own, spoilt in ((None, False), (kernels, False), (kernels, True)):
        pools = Pools(layout, 5, 16, "cpu", own)
        pools.keys[0].copy_(keys)
        pools.values[0].copy_(some(5, 16, 1, 16, seed=3))
        pools.keys[0][:, 7] = 0.0
        if spoilt:
            pools.keys[0][2, 3] = torch.nan
        results.append(pools.step(batch).attend(0, query, keys[:, 15].to(dtype), value, 1.0, None))
    assert_near(results[1], results[0], 4 * DTYPES[dtype])
    others = [0, 1, 3, 4]
    assert torch.equal(results[2][others], results[1][others])
    assert results[2][2].isnan().all()

    prompt = keys[0].to(dtype).clone()
    prompt[7] = 0.0
    states = query[:1].expand(16, 2, 16).contiguous(), prompt, some(16, 1, 16, dtype=dtype, seed=4)
    found = causal_attention([16], kernels=kernels).attend(*states, 1.0, None)
    assert_near(found, one_sequence(*(x.double() for x in states), 1.0, None), 2 * DTYPES[dtype])
