"""PrAd-PA over ragged rows of many tasks equals the paper's formula, token by token."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from prad.adapters import AdaptedSpan, Adapter, PromptAdaptation, find_method, new_adapter
from prad.lm import LanguageModel, PackedBatch, Site

HIDDEN, LAYERS = 48, 4


def adapter(seed: int, r: int = 8, scale: float = 1.0, bias: bool = True) -> Adapter:
    method = find_method("prad-pa")
    generator = torch.Generator().manual_seed(seed)
    shapes = {"ffn.down": (HIDDEN, r), "ffn.up": (r, HIDDEN)} | ({"ffn.bias": (r,)} if bias else {})
    parameters = {n: torch.randn(LAYERS, *s, generator=generator) * 0.3 for n, s in shapes.items()}
    return Adapter(
        method, method.config_type.model_validate({"r": r, "scale": scale, "bias": bias}), parameters
    )


def naive(spans: Sequence[AdaptedSpan], layer: int, value: Tensor, source: Tensor) -> Tensor:
    """value + s · ReLU(x Wd + b) Wu for each adapted row, one after the other, in float64."""
    out = value.double().clone()
    for span in spans:
        own = {n: p[layer].double() for n, p in span.adapter.parameters.items()}
        for row in range(span.start, span.start + span.length):
            x = source[row].double()
            hidden = x @ own["ffn.down"]
            if "ffn.bias" in own:
                hidden = hidden + own["ffn.bias"]
            out[row] += span.adapter.config.scale * (hidden.clamp(min=0) @ own["ffn.up"])  # type: ignore[attr-defined]
    return out.float()


def a_pass(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    value, source = torch.randn(2, rows, HIDDEN, generator=generator)
    return value, source


def applied(spans: Sequence[AdaptedSpan], layer: int, value: Tensor, source: Tensor) -> Tensor:
    out = value.clone()
    if spans:
        PromptAdaptation(spans, "cpu").apply(layer, Site.FFN_OUT, out, source)
    return out


A, B, C = adapter(1), adapter(2), adapter(3, r=5)
SCALED, PLAIN = adapter(4, scale=0.25), adapter(5, bias=False)
WIDE = adapter(6, r=64, scale=-2.0, bias=False)
MIXES: dict[str, tuple[int, list[AdaptedSpan]]] = {
    "one token": (1, [AdaptedSpan(A, 0, 1)]),
    "one adapter, all rows": (9, [AdaptedSpan(A, 0, 9)]),
    "one adapter, rows around it plain": (9, [AdaptedSpan(A, 3, 2)]),
    "one adapter, several spans": (20, [AdaptedSpan(A, 1, 4), AdaptedSpan(A, 9, 1), AdaptedSpan(A, 15, 5)]),
    "two alike, ragged": (20, [AdaptedSpan(A, 0, 1), AdaptedSpan(B, 1, 19)]),
    "alike, but scaled": (9, [AdaptedSpan(A, 0, 4), AdaptedSpan(SCALED, 4, 5)]),
    "bias and none": (9, [AdaptedSpan(PLAIN, 0, 4), AdaptedSpan(A, 4, 5)]),
    "repeated in turn": (12, [AdaptedSpan((A, B, C)[i % 3], 2 * i, 1 + i % 2) for i in range(6)]),
    "every kind, ragged": (
        64,
        [
            AdaptedSpan(WIDE, 0, 1),
            AdaptedSpan(C, 1, 17),
            AdaptedSpan(A, 20, 2),
            AdaptedSpan(PLAIN, 22, 9),
            AdaptedSpan(SCALED, 33, 1),
            AdaptedSpan(B, 34, 15),
            AdaptedSpan(A, 49, 3),
            AdaptedSpan(WIDE, 60, 4),
        ],
    ),
    "forty adapters": (120, [AdaptedSpan(adapter(100 + i), 3 * i, 1 + i % 3) for i in range(40)]),
    "none": (5, []),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layer", [0, 3])
def test_the_contribution_is_the_formula(mix: str, layer: int) -> None:
    rows, spans = MIXES[mix]
    value, source = a_pass(rows)
    assert PromptAdaptation(spans, "cpu").sites == ({Site.FFN_OUT} if spans else frozenset())
    got = applied(spans, layer, value, source)
    torch.testing.assert_close(got, naive(spans, layer, value, source), rtol=1e-5, atol=1e-5)
    plain = set(range(rows)) - {r for s in spans for r in range(s.start, s.start + s.length)}
    assert all(torch.equal(got[row], value[row]) for row in plain)


@pytest.mark.parametrize("spans", [MIXES["every kind, ragged"][1], MIXES["forty adapters"][1]])
def test_order_and_company_do_not_matter(spans: list[AdaptedSpan]) -> None:
    value, source = a_pass(120)
    together = applied(spans, 1, value, source)
    backwards = applied(spans[::-1], 1, value, source)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)
    for span in spans:
        alone = applied([span], 1, value, source)
        own = slice(span.start, span.start + span.length)
        torch.testing.assert_close(together[own], alone[own], rtol=0, atol=1e-5)


def test_gradients_reach_the_adapter_of_each_row_and_no_other() -> None:
    one, other = adapter(1), adapter(2)
    for p in [*one.parameters.values(), *other.parameters.values()]:
        p.requires_grad_()
    value, source = a_pass(8)
    out = applied([AdaptedSpan(one, 0, 3), AdaptedSpan(other, 3, 5)], 2, value, source)
    out[:3].sum().backward()
    assert all(
        p.grad is not None and p.grad[2].any() and not p.grad[[0, 1, 3]].any()
        for p in one.parameters.values()
    )
    assert all(p.grad is None or not p.grad.any() for p in other.parameters.values())


def test_a_neighbours_broken_adapter_stays_with_its_rows() -> None:
    """Finite weights, but so large that every hidden state overflows."""
    broken = adapter(7)
    broken.parameters["ffn.down"].mul_(1e38)
    value, source = a_pass(9)
    got = applied([AdaptedSpan(A, 0, 4), AdaptedSpan(broken, 4, 3)], 0, value, source * 1e3)
    alone = applied([AdaptedSpan(A, 0, 4)], 0, value, source * 1e3)
    assert not got[4:7].isfinite().all()
    torch.testing.assert_close(got[:4], alone[:4], rtol=0, atol=1e-6 * float(alone.abs().max()))
    assert torch.equal(got[7:], value[7:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("config", [{}, {"r": 3, "bias": False}, {"scale": 7.0}])
def test_a_fresh_adapter_leaves_the_model_as_it_is(
    family: str, config: dict[str, object], load_tiny: Callable[[str], LanguageModel]
) -> None:
    model = load_tiny(family)
    method = find_method("prad-pa")
    fresh = new_adapter(method, method.config_type.model_validate(config), model, seed=5)
    prompts = [[5, 6, 7], [9], list(range(40))]
    adaptation = PromptAdaptation(
        [AdaptedSpan(fresh, 0, 3), AdaptedSpan(fresh, 3, 1), AdaptedSpan(fresh, 4, 40)], "cpu"
    )
    with torch.inference_mode():
        plain = model.forward(PackedBatch.of_sequences(prompts))
        adapted = model.forward(PackedBatch.of_sequences(prompts), adaptation)
    assert torch.equal(plain, adapted)
    down = fresh.parameters["ffn.down"]
    assert down.abs().sum() > 0
    assert not torch.equal(down[0], down[1]), "every layer starts from its own numbers"
    again = new_adapter(method, method.config_type.model_validate(config), model, seed=5)
    assert torch.equal(down, again.parameters["ffn.down"])


def test_nothing_stays_behind_on_the_model(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    batch = PackedBatch.of_sequences([[1, 2, 3]])

    class Broken:
        sites = frozenset({Site.FFN_OUT})

        def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
            if layer == 2:
                raise RuntimeError("in mid-pass")
            value.add_(1)

    with torch.inference_mode():
        plain = model.forward(batch)
        with pytest.raises(RuntimeError, match="in mid-pass"):
            model.forward(batch, Broken())
        assert torch.equal(model.forward(batch), plain)
        changed = model.forward(batch, PromptAdaptation([AdaptedSpan(A, 0, 3)], "cpu"))
        assert not torch.equal(changed, plain)
        assert torch.equal(model.forward(batch), plain)
