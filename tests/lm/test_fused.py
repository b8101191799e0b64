"""The fused forward equals the generic one: every family it covers, adapted or plain, prompts and steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import SIZES, packed_logits, save_random, some_ids

from prad.lm import LanguageModel, PackedBatch, RowScaling, Site, UnsupportedModelError
from prad.lm.kernels import Kernels, Precision
from prad.lm.kv import Pools

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gpt2": ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
}
WHOLE_TILES = {"hidden_size": 64, "n_inner": 96}  # bfloat16 wants inputs in multiples of 32
LENGTHS = (33, 1, 64, 31, 2, 65)
TOLERANCE = 1e-4  # of the logit range


class Everywhere:
    """Adapts every site that a family has, half of the rows only."""

    def __init__(self, sites: frozenset[Site]) -> None:
        self.sites = sites

    def apply(self, layer: int, site: Site, value: torch.Tensor, source: torch.Tensor) -> None:
        half = len(value) // 2
        value[:half] += 0.1 * source[:half].mean(dim=1, keepdim=True) * (1 + layer + len(site.value) / 7)


def models(family: str, folder: Path, kernels: Kernels) -> tuple[LanguageModel, LanguageModel]:
    """Generic and fused."""
    name, special = FAMILIES[family]
    save_random(getattr(transformers, name)(**SIZES | special), folder)
    generic, fused = (LanguageModel.load(folder, dtype=torch.float32) for _ in range(2))
    fused.accelerate(kernels)
    assert fused.is_fused
    return generic, fused


def assert_equal(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=TOLERANCE * float(expected.max() - expected.min())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts(family: str, tmp_path: Path, kernels: Kernels) -> None:
    generic, fused = models(family, tmp_path, kernels)
    sequences = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    for ours, expected in zip(
        packed_logits(fused, sequences), packed_logits(generic, sequences), strict=True
    ):
        assert_equal(ours, expected)


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_alone_and_beside_adapted_ones(
    family: str, precision: Precision, tmp_path: Path, kernels: Kernels
) -> None:
    """In bfloat16, 8 and 4 bits, at every site; and in a decode step beside sequences with request state."""
    name, special = FAMILIES[family]
    save_random(getattr(transformers, name)(**SIZES | special | WHOLE_TILES), tmp_path)
    fused = LanguageModel.load(tmp_path, dtype=torch.bfloat16)
    fused.accelerate(kernels, precision)
    assert fused.is_fused
    batch = [some_ids(length, seed) for seed, length in enumerate((164, *LENGTHS))]
    sites = frozenset(Site) - ({Site.GATE} if family == "gpt2" else set())
    with torch.inference_mode():
        alone = [fused.forward(PackedBatch.of_sequences([ids], kernels=kernels)) for ids in batch]
        mixed = fused.forward(PackedBatch.of_sequences(batch, kernels=kernels), Everywhere(sites))
    same = [torch.equal(mixed[i], row[0]) for i, row in enumerate(alone)]
    assert same == [False, False, True, True, True, True, True]
    steps, scaled = decode_steps(fused), decode_steps(fused, scaling(fused))
    same = [torch.equal(steps[:, i], scaled[:, i]) for i in range(len(LENGTHS))]
    assert same == [False, True, False, True, True, True]


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_has_the_bits_of_as_many_steps(
    family: str, precision: Precision, tmp_path: Path, kernels: Kernels
) -> None:
    """Over the edge of a block, beside neighbours with drafts of their own and a sequence with none."""
    name, special = FAMILIES[family]
    save_random(getattr(transformers, name)(**SIZES | special | WHOLE_TILES), tmp_path)
    fused = LanguageModel.load(tmp_path, dtype=torch.bfloat16)
    fused.accelerate(kernels, precision)
    drafts = {0: (13, 6), 1: (0, 1), 2: (31, 9)}  # stored tokens, tokens fed
    tokens = {i: some_ids(fed, i) for i, (_, fed) in drafts.items()}
    stepped, drafted = (Pools(fused.layout, 12, 16, "cpu", kernels) for _ in range(2))
    for pool, other in zip((*stepped.keys, *stepped.values), (*drafted.keys, *drafted.values), strict=True):
        pool.normal_(generator=torch.Generator().manual_seed(1))
        other.copy_(pool)

    def logits(pools: Pools, rows: list[tuple[int, int]], together: bool) -> torch.Tensor:
        batch: list[Any] = [
            SimpleNamespace(blocks=[i, 3 + i, 6 + i], kv_len=drafts[i][0] + ahead) for i, ahead in rows
        ]
        ids, at = torch.tensor([tokens[i][a] for i, a in rows]), torch.tensor([s.kv_len for s in batch])
        kv = pools.step(batch, drafted=together)
        with torch.inference_mode():
            return fused.forward(PackedBatch(ids, at, kv, torch.arange(len(rows))))

    rows = [(i, ahead) for i, (_, fed) in drafts.items() for ahead in range(fed)]
    alone = torch.cat([logits(stepped, [row], together=False) for row in rows])
    assert torch.equal(logits(drafted, rows, together=True), alone)
    assert all(map(torch.equal, drafted.keys, stepped.keys))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", Site)
def test_adapted_prompts(family: str, site: Site, tmp_path: Path, kernels: Kernels) -> None:
    generic, fused = models(family, tmp_path, kernels)
    if family == "gpt2" and site is Site.GATE:
        with pytest.raises(Exception, match="no site gate"):
            fused.forward(PackedBatch.of_sequences([[1]]), Everywhere(frozenset({site})))
        return
    batch = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    with torch.inference_mode():
        plain = generic.forward(PackedBatch.of_sequences(batch))
        ours, expected = (
            model.forward(PackedBatch.of_sequences(batch), Everywhere(frozenset({site})))
            for model in (fused, generic)
        )
    assert not torch.allclose(expected, plain), "the adaptation changes nothing"
    assert_equal(ours, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps(family: str, tmp_path: Path, kernels: Kernels) -> None:
    generic, fused = models(family, tmp_path, kernels)
    assert_equal(decode_steps(fused), decode_steps(generic))


def scaling(model: LanguageModel) -> RowScaling:
    """The first sequence has vectors everywhere, the third at its values and queries, the others none."""
    generator = torch.Generator().manual_seed(7)
    widths = model.state_widths

    def vectors(*sites: Site) -> dict[Site, torch.Tensor]:
        size = {site: (model.num_layers, widths[site]) for site in sites}
        return {site: torch.randn(size[site], generator=generator) for site in sites}

    rows: list[dict[Site, torch.Tensor] | None] = [None] * len(LENGTHS)
    rows[0], rows[2] = vectors(*widths), vectors(Site.V, Site.Q)
    return RowScaling(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_with_request_state(family: str, tmp_path: Path, kernels: Kernels) -> None:
    generic, fused = models(family, tmp_path, kernels)
    ours, expected, plain = (
        decode_steps(fused, scaling(fused)),
        decode_steps(generic, scaling(generic)),
        decode_steps(generic),
    )
    assert_equal(ours, expected)
    changed = [not torch.allclose(expected[:, i], plain[:, i], rtol=1e-3) for i in range(len(LENGTHS))]
    assert changed == [True, False, True, False, False, False]


def decode_steps(model: LanguageModel, scaling: RowScaling | None = None) -> torch.Tensor:
    """Logits of three steps behind a prompt pass, over blocks."""
    pools = Pools(model.layout, 60, 16, "cpu", model.kernels)
    batch: list[Any] = [
        SimpleNamespace(blocks=list(range(10 * i, 10 * i + 10)), kv_len=n) for i, n in enumerate(LENGTHS)
    ]
    slots = torch.cat([pools.slots(s.blocks, s.kv_len) for s in batch])

    def keep(layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        pools.keys[layer].flatten(0, 1)[slots] = key
        pools.values[layer].flatten(0, 1)[slots] = value

    logits = []
    with torch.inference_mode():
        prompts = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
        model.forward(PackedBatch.of_sequences(prompts, layer_done=keep))
        for step in range(3):
            ids = torch.tensor([5 + step + i for i in range(len(batch))])
            positions = torch.tensor([s.kv_len for s in batch])
            every = torch.arange(len(batch))
            logits.append(model.forward(PackedBatch(ids, positions, pools.step(batch), every), scaling))
            for sequence in batch:
                sequence.kv_len += 1
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_equals_the_layers_called_one_by_one(
    dtype: torch.dtype, tmp_path: Path, kernels: Kernels
) -> None:
    """Batches that grow beyond a recording and shrink within it, over the same blocks."""
    save_random(transformers.LlamaConfig(**SIZES | {"hidden_size": 64, "num_attention_heads": 4}), tmp_path)
    model = LanguageModel.load(tmp_path, dtype=dtype)
    model.accelerate(kernels)
    generator = torch.Generator().manual_seed(0)
    recorded, direct = (Pools(model.layout, 80, 16, "cpu", kernels) for _ in range(2))
    for ours, theirs in zip((*recorded.keys, *recorded.values), (*direct.keys, *direct.values), strict=True):
        ours.normal_(generator=generator)
        theirs.copy_(ours)
    untouched = Nothing()
    with torch.inference_mode():
        for sequences in (15, 16, 17, 33, 5, 64, 1):
            batch: list[Any] = [SimpleNamespace(blocks=[i], kv_len=i % 15) for i in range(sequences)]
            rows = torch.arange(sequences)
            ids, positions = rows + 5, torch.tensor([s.kv_len for s in batch])
            ours = model.forward(PackedBatch(ids, positions, recorded.step(batch), rows))
            theirs = model.forward(PackedBatch(ids, positions, direct.step(batch), rows), untouched)
            assert torch.equal(ours, theirs), f"{sequences} sequences"
    assert {(room, sites) for _, room, sites in recorded.recorded} == {(n, ()) for n in (16, 32, 64)}
    assert not direct.recorded


class Nothing:
    """An adaptation that is never asked: with it a step is not recorded."""

    sites: frozenset[Site] = frozenset()

    def apply(self, layer: int, site: Site, value: torch.Tensor, source: torch.Tensor) -> None:
        raise AssertionError("asked")


def test_a_recording_serves_passes_with_and_without_inference_mode(tmp_path: Path, kernels: Kernels) -> None:
    save_random(transformers.LlamaConfig(**SIZES), tmp_path)
    model = LanguageModel.load(tmp_path, dtype=torch.float32)
    model.accelerate(kernels)
    pools, one = Pools(model.layout, 4, 16, "cpu", kernels), torch.zeros(1, dtype=torch.long)
    batch: list[Any] = [SimpleNamespace(blocks=[0], kv_len=0)]
    with torch.inference_mode():
        first = model.forward(PackedBatch(one, one, pools.step(batch), one))
    with torch.no_grad():
        assert torch.equal(first, model.forward(PackedBatch(one, one, pools.step(batch), one)))


UNFUSED = {
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),  # values lie between queries and keys of other heads
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("family", UNFUSED)
def test_decode_steps_of_families_that_are_not_fused(family: str, tmp_path: Path, kernels: Kernels) -> None:
    name, special = UNFUSED[family]
    save_random(getattr(transformers, name)(**SIZES | special), tmp_path)
    plain, with_kernels = (LanguageModel.load(tmp_path, dtype=torch.float32) for _ in range(2))
    with_kernels.accelerate(kernels)
    assert not with_kernels.is_fused
    assert_equal(decode_steps(with_kernels), decode_steps(plain))


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.15), ("int4", 0.2)])
def test_rounded_weights_are_near_and_not_equal(
    precision: Precision, most: float, tmp_path: Path, kernels: Kernels
) -> None:
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 64, "num_attention_heads": 4})
    save_random(config, tmp_path)
    full, rounded = (LanguageModel.load(tmp_path, dtype=torch.bfloat16) for _ in range(2))
    full.accelerate(kernels)
    rounded.accelerate(kernels, precision)
    (a,), (b,) = (packed_logits(model, [some_ids(40, 0)]) for model in (full, rounded))
    difference = float((a.float() - b.float()).abs().max())
    assert 0 < difference < most * float(a.max() - a.min())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_cannot_be_rounded_is_refused(precision: Precision, tmp_path: Path, kernels: Kernels) -> None:
    save_random(transformers.GPTNeoXConfig(**SIZES), tmp_path)
    model = LanguageModel.load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=f"{precision} weights are for"):
        model.accelerate(kernels, precision)
    model.accelerate(kernels)  # its attention and argmax only
    assert not model.is_fused
