"""Named places in a layer where an adapter may act, and where each model family keeps them.

The model knows the places, never the adapters: a pass receives one `Adaptation` and asks it at each site it
names. The taps live for one pass only, so nothing stays behind on the frozen model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prad.lm.errors import MissingSiteError
from prad.lm.kv import KVTarget


class Site(StrEnum):
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's name for the output projection
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    DOWN_IN = "down_in"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    EMBEDDING = "embedding"
    KEYS = "keys"
    VALUES = "values"


_OF_ALL_FAMILIES = frozenset({Site.EMBEDDING, Site.KEYS, Site.VALUES})
"""Sites outside the layers' modules: the tokens' embeddings, and what goes to the KV cache (keys after their
norm and RoPE)."""


class Adaptation(Protocol):
    """What adapters do to one packed pass."""

    @property
    def sites(self) -> frozenset[Site]:
        """The sites it wants to be asked at."""
        ...

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        """Changes the site's value in place: a copy per site and layer would cost more than the adapters.

        value [T, width]: what the frozen model has at the site, the pass's own tensor or a part of its
        columns; source [T, in_width]: the input of the module that computed it (for all inputs, EMBEDDING,
        KEYS and VALUES the value itself). KEYS and VALUES are [T, kv_heads, dim]; EMBEDDING is asked for
        once, as of layer 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Tap:
    """Where a site is: a module below the layer, its input or output, and which part of a fused output."""

    path: str
    is_input: bool = False
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class _Family:
    layers: str
    taps: dict[Site, _Tap]


_LLAMA = _Family(
    "model.layers",
    {
        Site.Q: _Tap("self_attn.q_proj"),
        Site.K: _Tap("self_attn.k_proj"),
        Site.V: _Tap("self_attn.v_proj"),
        Site.O: _Tap("self_attn.o_proj"),
        Site.GATE: _Tap("mlp.gate_proj"),
        Site.UP: _Tap("mlp.up_proj"),
        Site.DOWN: _Tap("mlp.down_proj"),
        Site.DOWN_IN: _Tap("mlp.down_proj", is_input=True),
        Site.FFN_IN: _Tap("mlp", is_input=True),
        Site.FFN_OUT: _Tap("mlp"),
    },
)
_GPT2 = _Family(
    "transformer.h",
    {
        Site.Q: _Tap("attn.c_attn", part=0, parts=3),
        Site.K: _Tap("attn.c_attn", part=1, parts=3),
        Site.V: _Tap("attn.c_attn", part=2, parts=3),
        Site.O: _Tap("attn.c_proj"),
        Site.UP: _Tap("mlp.c_fc"),
        Site.DOWN: _Tap("mlp.c_proj"),
        Site.DOWN_IN: _Tap("mlp.c_proj", is_input=True),
        Site.FFN_IN: _Tap("mlp", is_input=True),
        Site.FFN_OUT: _Tap("mlp"),
    },
)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


def require_sites(model_type: str, sites: frozenset[Site]) -> None:
    """Raises MissingSiteError unless the family `model_type` has all of `sites`."""
    sites -= _OF_ALL_FAMILIES
    if not sites:
        return
    family = _FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise MissingSiteError(f"adapters know no sites in a '{model_type}' model (families: {known})")
    missing = sorted(sites - family.taps.keys())
    if missing:
        raise MissingSiteError(f"a '{model_type}' model has no site {', '.join(missing)}")


def projection(model: nn.Module, model_type: str, layer: int, site: Site) -> tuple[Tensor, Tensor | None]:
    """Frozen weight [out, in] and bias [out] of the projection whose output is `site`: views, no copies.

    Raises MissingSiteError if the family does not have the site, or no projection computes it.
    """
    require_sites(model_type, frozenset({site}))
    family = _FAMILIES[model_type]
    tap = family.taps[site]
    module = model.get_submodule(f"{family.layers}.{layer}.{tap.path}")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if tap.is_input or not isinstance(weight, Tensor):
        raise MissingSiteError(f"{site} is not the output of a projection")
    if not isinstance(module, nn.Linear):  # GPT-2's Conv1D keeps [in, out]
        weight = weight.T
    own_bias = bias.chunk(tap.parts)[tap.part] if isinstance(bias, Tensor) else None
    return weight.chunk(tap.parts)[tap.part], own_bias


@contextmanager
def tapped(model: nn.Module, model_type: str, adaptation: Adaptation | None) -> Iterator[None]:
    """Routes the model's values through `adaptation` at its sites, for the pass inside the `with`."""
    if adaptation is None:
        yield
        return
    require_sites(model_type, adaptation.sites)
    inside = sorted(adaptation.sites - _OF_ALL_FAMILIES)
    handles = []
    try:
        if Site.EMBEDDING in adaptation.sites:
            handles.append(_attach_to_embedding(model, adaptation))
        if inside:
            family = _FAMILIES[model_type]
            for index, layer in enumerate(model.get_submodule(family.layers).children()):
                for site in inside:
                    handles.append(_attach(layer, index, site, family.taps[site], adaptation))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(layer: nn.Module, index: int, site: Site, tap: _Tap, adaptation: Adaptation) -> Any:
    module = layer.get_submodule(tap.path)

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0].squeeze(0)
        adaptation.apply(index, site, value, value)

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        width = output.shape[-1] // tap.parts
        value = output.squeeze(0).narrow(-1, tap.part * width, width)
        adaptation.apply(index, site, value, args[0].squeeze(0))

    if tap.is_input:
        return module.register_forward_pre_hook(on_input)
    return module.register_forward_hook(on_output)


def _attach_to_embedding(model: Any, adaptation: Adaptation) -> Any:
    def on_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        value = output.squeeze(0)
        adaptation.apply(0, Site.EMBEDDING, value, value)

    return model.get_input_embeddings().register_forward_hook(on_output)


@dataclass(frozen=True, slots=True)
class TappedKV:
    """A pass's KVTarget with the sites KEYS and VALUES in front of it: the same place in every family."""

    target: KVTarget
    adaptation: Adaptation

    @classmethod
    def of(cls, target: KVTarget, adaptation: Adaptation | None) -> KVTarget:
        """`target` itself if nobody wants to be asked."""
        if adaptation is None or adaptation.sites.isdisjoint({Site.KEYS, Site.VALUES}):
            return target
        return cls(target, adaptation)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if torch.is_grad_enabled():  # autograd forbids writing into a part of a fused output
            key, value = key.clone(), value.clone()
        for site, states in ((Site.KEYS, key), (Site.VALUES, value)):
            if site in self.adaptation.sites:
                self.adaptation.apply(layer, site, states, states)
        return self.target.attend(layer, query, key, value, scale, window)
