"""PrAd-LoRA, alone and beside other methods and ranks, equals its formula row by row; and what may not be
asked of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prad.adapters import (
    AdaptedSpan,
    Adapter,
    AdapterError,
    ParameterMismatchError,
    PromptAdaptation,
    find_method,
    load_adapter,
    new_adapter,
    placeholders,
    prepared,
)
from prad.adapters.method import FrozenModel
from prad.adapters.segments import Span, cut
from prad.artefact import read_artefact
from prad.lm import LanguageModel, MissingSiteError, PackedBatch, Site
from prad.lm.kernels import Kernels
from tests.conftest import CONFIGS, random_artefact, randomised

METHODS = ("prad-pa", "prad-sa", "prad-lora", "prad-dora", "prad-ia3", "prad-bitfit", "prad-para", "para")
WITH_VIRTUAL_TOKENS = ("prad-prefix", "prad-prompt", "prad-mam")
IN, OUT, LAYERS, LAYER = 24, 40, 3, 2


def lora(seed: int, r: int, **config: object) -> Adapter:
    method = find_method("prad-lora")
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "q.down": torch.randn(LAYERS, IN, r, generator=generator),
        "q.up": torch.randn(LAYERS, r, OUT, generator=generator),
    }
    return Adapter(method, method.configure({"r": r, "targets": ["q"], **config}), parameters)


def written_out(
    spans: Sequence[AdaptedSpan], factors: dict[Adapter, float], value: Tensor, source: Tensor
) -> Tensor:
    """y_i + s Σ_j B_ij Σ_k A_jk x_k for each adapted row, in float64."""
    out = value.double().clone()
    for adapter, start, length, *_ in spans:
        a, b = (adapter.parameters[f"q.{n}"][LAYER].double().T for n in ("down", "up"))
        for row in range(start, start + length):
            out[row] += factors[adapter] * torch.einsum("ij,jk,k->i", b, a, source[row].double())
    return out.float()


@pytest.mark.parametrize("native", [False, True])
def test_many_ranks_and_scales_in_one_pass(native: bool, kernels: Kernels) -> None:
    settings: list[tuple[int, dict[str, object], float]] = [
        (8, {"alpha": 8}, 1.0),
        (8, {"alpha": 16}, 2.0),
        (16, {"alpha": 4}, 0.25),
        (4, {"alpha": 6, "rslora": True}, 3.0),
        (70, {"alpha": 70}, 1.0),  # more than a segment joins
        (1, {"alpha": 0.5}, 0.5),
    ]
    factors = {lora(i, r, **config): factor for i, (r, config, factor) in enumerate(settings)}
    adapters, spans, row = list(factors), [], 1
    for turn in range(30):
        length = 130 if turn == 4 else 1 + turn * 7 % 11  # more rows than a thread takes at once
        spans.append(AdaptedSpan(adapters[turn * 5 % 6], row, length))
        row += length + turn % 3  # with rows of the plain model between
    generator = torch.Generator().manual_seed(9)
    value, source = (
        torch.randn(row + 2, OUT, generator=generator),
        torch.randn(row + 2, IN, generator=generator),
    )
    got = value.clone()
    with torch.inference_mode():
        adaptation = PromptAdaptation(spans[::-1], "cpu", kernels if native else None)
        adaptation.apply(LAYER, Site.Q, got, source)
    torch.testing.assert_close(got, written_out(spans, factors, value, source), rtol=1e-4, atol=1e-4)
    wrong = written_out(spans, dict.fromkeys(adapters, 1.0), value, source)
    assert not torch.allclose(got, wrong, rtol=1e-2, atol=1e-2), "the factors matter"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("method", "name"), [("prad-ia3", "k.ia3_l"), ("prad-bitfit", "k.bias")])
def test_many_vectors_in_one_pass(method: str, name: str, native: bool, kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(9)
    kind = find_method(method)
    config = kind.configure({"targets": ["k"]})
    adapters = [
        Adapter(kind, config, {name: torch.randn(LAYERS, OUT, generator=generator)}) for _ in range(3)
    ]
    lengths = (1, 130, 63, 64, 65, 200)  # some of more rows than a thread takes at once
    spans, row = [], 1
    for i, length in enumerate(lengths):
        spans.append(AdaptedSpan(adapters[i * 2 % 3], row, length))
        row += length + i % 3  # with rows of the plain model between
    value = torch.randn(row + 2, OUT, generator=generator)
    expected = value.clone()
    for adapter, start, length, *_ in spans:
        rows, vector = expected[start : start + length], adapter.parameters[name][LAYER]
        _ = rows.mul_(vector) if method == "prad-ia3" else rows.add_(vector)
    with torch.inference_mode():
        adaptation = PromptAdaptation(spans[::-1], "cpu", kernels if native else None)
        adaptation.apply(LAYER, Site.K, value, value)
    torch.testing.assert_close(value, expected)


def test_a_part_of_a_fused_output_is_changed_in_place() -> None:
    adapter = lora(1, 4)
    fused, source = torch.randn(6, 3 * OUT), torch.randn(6, IN)
    before = fused.clone()
    part = fused.narrow(1, OUT, OUT)
    PromptAdaptation([AdaptedSpan(adapter, 1, 3)], "cpu").apply(LAYER, Site.Q, part, source)
    expected = written_out([AdaptedSpan(adapter, 1, 3)], {adapter: 4.0}, before[:, OUT : 2 * OUT], source)
    torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(fused[:, :OUT], before[:, :OUT])
    assert torch.equal(fused[:, 2 * OUT :], before[:, 2 * OUT :])


def test_segments_cover_neighbours_up_to_a_rank_and_never_split_a_span() -> None:
    spans = [Span(0, 5, 0), Span(5, 9, 1), Span(9, 10, 0), Span(12, 20, 2), Span(20, 25, 3), Span(90, 91, 3)]
    segments = cut(spans, ranks=[32, 32, 8, 100], factors=[1.0, 1.0, 1.0, 0.5], device="cpu")
    assert [(s.rows.start, s.rows.stop, s.adapters) for s in segments] == [
        (0, 10, (0, 1)),
        (12, 20, (2,)),
        (20, 25, (3,)),
        (90, 91, (3,)),  # too far away
    ]
    (mixed, *alone) = segments
    assert mixed.foreign is not None
    assert mixed.foreign.sum(1).tolist() == [32] * 10
    assert [s.foreign for s in alone] == [None] * 3
    assert [s.factor for s in segments] == [1.0, 1.0, 0.5, 0.5]


def test_a_gpu_joins_more_adapters() -> None:
    spans = [Span(5 * number, 5 * number + 5, number) for number in range(65)]
    ranks, factors = [16] * 65, [1.0] * 65
    assert [len(s.adapters) for s in cut(spans, ranks, factors, "cpu")] == [4] * 16 + [1]
    assert [len(s.adapters) for s in cut(spans, ranks, factors, "meta")] == [64, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_method_beside_every_other_equals_itself_alone(
    family: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny(family)
    adapters = [
        load_adapter(random_artefact(tmp_path / f"{name}{i}", model, i, method=name, config={}), model)
        for i, name in enumerate((METHODS + WITH_VIRTUAL_TOKENS) * 2)
    ]
    prompts = [
        [*placeholders(adapter.virtual_tokens), *((3 * i + j * j) % 119 for j in range(4 + 3 * i))]
        for i, adapter in enumerate(adapters)
    ]
    lengths = [len(p) for p in prompts]
    with torch.inference_mode():
        mixed = model.forward(
            PackedBatch.of_sequences(prompts), PromptAdaptation.of_prompts(adapters, lengths, lengths, "cpu")
        )
        for i, prompt in enumerate(prompts):
            own = PromptAdaptation.of_prompts([adapters[i]], [len(prompt)], [len(prompt)], "cpu")
            alone = model.forward(PackedBatch.of_sequences([prompt]), own)[0]
            scale = float(alone.max() - alone.min())
            torch.testing.assert_close(mixed[i], alone, rtol=0, atol=1e-4 * scale)
            own_tokens = prompt[adapters[i].virtual_tokens :]
            plain = model.forward(PackedBatch.of_sequences([own_tokens]))[0]
            assert float((plain - alone).abs().max()) > 1e-2 * scale, "the adapter has weight"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_of_any_method_is_the_plain_model(
    name: str, family: str, load_tiny: Callable[[str], LanguageModel]
) -> None:
    model, method = load_tiny(family), find_method(name)
    fresh = prepared(new_adapter(method, method.configure({}), model, seed=2), model)
    batch = PackedBatch.of_sequences([[5, 6, 7], [9]])
    with torch.inference_mode():
        adaptation = PromptAdaptation.of_prompts([fresh, fresh], [3, 1], [3, 1], "cpu")
        torch.testing.assert_close(model.forward(batch, adaptation), model.forward(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("prad-lora", {"targets": []}, "expected a list of some of q, k, v, o, gate, up, down, each once"),
        ("prad-lora", {"targets": ["down_in"]}, "up, down, each once, got"),
        ("prad-bitfit", {"targets": ["down_in"]}, "up, down, each once, got"),
        ("prad-lora", {"targets": ["q", "q"]}, "each once"),
        ("prad-lora", {"targets": ["ffn_out"]}, "expected a list of some of"),
        ("prad-lora", {"targets": ["query"]}, r'targets: .*q, k, v, o, gate, up, down, .*got \["query"\]'),
        ("prad-lora", {"targets": "q"}, 'expected a list .*got "q"'),
        ("prad-lora", {"targets": [["q"]]}, "expected a list"),
        ("prad-lora", {"r": 0}, "r: "),
        ("prad-lora", {"r": 8.5}, "r: "),
        ("prad-lora", {"alpha": True}, "alpha: .*number, got true"),
        ("prad-lora", {"alpha": 0}, "alpha: expected a number other than 0, .*got 0"),
        ("prad-lora", {"rslora": "false"}, 'rslora: .*boolean, got "false"'),
        ("prad-pa", {"scale": float("nan")}, "scale: "),
        ("prad-dora", {"lora_alpha": 3}, "lora_alpha: expected some of r, alpha, rslora, targets"),
        ("prad-ia3", {"targets": ["k", "ffn_out"]}, "some of q, k, v, o, gate, up, down, down_in"),
        ("prad-ia3", {"r": 8}, "r: expected some of targets"),
        ("prad-bitfit", {"missing": "ignore"}, "missing"),
        ("para", {"pooling": "first"}, "pooling"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    method: str, config: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=rf"configuration of {method}: .*{message}"):
        find_method(method).configure(config)


def test_what_the_family_lacks_is_refused_by_name(load_tiny: Callable[[str], LanguageModel]) -> None:
    lora_method, bitfit = find_method("prad-lora"), find_method("prad-bitfit")
    with pytest.raises(
        MissingSiteError, match=r"prad-lora: a 'gpt2' model has no site gate .*transformer.h has .*mlp.c_fc"
    ):
        new_adapter(lora_method, lora_method.configure({"targets": ["gate"]}), load_tiny("gpt2"), 0)
    refusing = bitfit.configure({"missing": "refuse"})
    assert new_adapter(bitfit, refusing, load_tiny("gpt2"), 0).parameters
    with pytest.raises(
        AdapterError,
        match=r"prad-bitfit: a 'llama' model has no bias in q, k, v, o, up, down "
        r"\(model\.layers\.\*\.self_attn\.q_proj, .*, model\.layers\.\*\.mlp\.down_proj\)",
    ):
        new_adapter(bitfit, refusing, load_tiny("llama"), 0)


def test_the_width_of_what_no_projection_computes_is_refused_by_module(
    load_tiny: Callable[[str], LanguageModel],
) -> None:
    said = r"in a 'llama' model no projection computes ffn_out \(model\.layers\.\*\.mlp\)"
    with pytest.raises(MissingSiteError, match=said):
        FrozenModel(load_tiny("llama")).width(Site.FFN_OUT)


def test_parts_without_a_bias_name_their_fused_module_once(tmp_path: Path) -> None:
    config = CONFIGS["gpt-neox"]()
    config.attention_bias = False
    randomised(config, seed=1).save_pretrained(tmp_path)
    model, bitfit = LanguageModel.load(tmp_path, dtype=torch.float32), find_method("prad-bitfit")
    refusing = bitfit.configure({"missing": "refuse", "targets": ["up", "v", "k"]})
    said = r"a 'gpt_neox' model has no bias in v, k \(gpt_neox\.layers\.\*\.attention\.query_key_value\)"
    with pytest.raises(AdapterError, match=said):
        new_adapter(bitfit, refusing, model, 0)


def test_weights_that_overflow_in_the_models_dtype_are_refused(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    artefact = random_artefact(tmp_path / "a", load_tiny("llama"), 0, method="prad-lora")
    tensors = load_file(artefact.weights)
    tensors["layers.1.q.lora_B"][0, 0] = 3.4e38  # finite in float32 alone
    save_file(tensors, artefact.weights)
    half = LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16)
    with pytest.raises(ParameterMismatchError, match=r"layers\.1\.q\.lora_B: .* in torch.bfloat16"):
        load_adapter(read_artefact(artefact.folder), half)
