"""Named places in a layer where an adapter may act, and where each model family keeps them.

The model knows the places, never the adapters: a pass receives one `Adaptation` and asks it at each site it
names. The taps live for one pass only, so nothing stays behind on the frozen model.

The paper's FFN (equations 4 and 6) is what lies between the norm before it and whatever comes behind it:
FFN_IN is the output of the norm before it (for an OPT that norms behind its sublayers, the residual stream),
FFN_OUT what it adds to the residual stream, before Gemma 3's second norm and OPT's norm behind the addition.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

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
    """Where a site is: a module below the layer, its input or output, and which part of a fused output.

    `by_head`: the parts of each head lie side by side (GPT-NeoX), not those of all heads. `entry`: the
    module whose input is the source, where it is not `path`'s own. `shared`: the input is also the residual
    stream in some models of the family, which an adapter of the site must not change.
    """

    path: str
    is_input: bool = False
    part: int = 0
    parts: int = 1
    by_head: bool = False
    entry: str | None = None
    shared: bool = False

    @property
    def is_projection(self) -> bool:
        """Whether the site is what its module makes of its own input."""
        return not self.is_input and self.entry is None

    def part_of(self, fused: Tensor, heads: int) -> Tensor:
        """fused [T, all parts] -> the site's own, a view: [T, width], or [T, heads, head_dim] by_head."""
        if self.by_head:
            return fused.view(len(fused), heads, self.parts, -1)[:, :, self.part]
        width = fused.shape[-1] // self.parts
        return fused.narrow(-1, self.part * width, width)


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
_GPT_NEOX = _Family(
    "gpt_neox.layers",
    {
        Site.Q: _Tap("attention.query_key_value", part=0, parts=3, by_head=True),
        Site.K: _Tap("attention.query_key_value", part=1, parts=3, by_head=True),
        Site.V: _Tap("attention.query_key_value", part=2, parts=3, by_head=True),
        Site.O: _Tap("attention.dense"),
        Site.UP: _Tap("mlp.dense_h_to_4h"),
        Site.DOWN: _Tap("mlp.dense_4h_to_h"),
        Site.DOWN_IN: _Tap("mlp.dense_4h_to_h", is_input=True),
        Site.FFN_IN: _Tap("mlp", is_input=True),
        Site.FFN_OUT: _Tap("mlp"),
    },
)
_OPT = _Family(
    "model.decoder.layers",
    {
        Site.Q: _Tap("self_attn.q_proj"),
        Site.K: _Tap("self_attn.k_proj"),
        Site.V: _Tap("self_attn.v_proj"),
        Site.O: _Tap("self_attn.out_proj"),
        Site.UP: _Tap("fc1"),
        Site.DOWN: _Tap("fc2"),
        Site.DOWN_IN: _Tap("fc2", is_input=True),
        Site.FFN_IN: _Tap("fc1", is_input=True, shared=True),  # no module is the FFN
        Site.FFN_OUT: _Tap("fc2", entry="fc1"),
    },
)
_FAMILIES = {
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def require_sites(model_type: str, sites: frozenset[Site], method: str = "the adapter") -> None:
    """Raises MissingSiteError unless the family `model_type` has all of the `sites` that `method` acts on."""
    sites -= _OF_ALL_FAMILIES
    if not sites:
        return
    family = _FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise MissingSiteError(
            f"{method}: adapters know no sites in a '{model_type}' model (families: {known})"
        )
    missing = sorted(sites - family.taps.keys())
    if missing:
        there = ", ".join(sorted({tap.path for tap in family.taps.values()}))
        raise MissingSiteError(
            f"{method}: a '{model_type}' model has no site {', '.join(missing)} (each of {family.layers} has "
            f"{there})"
        )


def module_paths(model_type: str, sites: Iterable[Site]) -> str:
    """What messages call the modules of `sites`: model.layers.*.mlp.up_proj."""
    family = _FAMILIES.get(model_type)
    if family is None:
        return "modules that adapters do not know"
    return ", ".join(dict.fromkeys(f"{family.layers}.*.{family.taps[site].path}" for site in sites))


def projection(model: nn.Module, model_type: str, layer: int, site: Site) -> tuple[Tensor, Tensor | None]:
    """Frozen weight [out, in] and bias [out] of the projection whose output is `site`.

    Views, or copies where the parts of each head lie side by side. Raises MissingSiteError if the family does
    not have the site, or no projection computes it.
    """
    require_sites(model_type, frozenset({site}))
    family = _FAMILIES[model_type]
    tap = family.taps[site]
    module = model.get_submodule(f"{family.layers}.{layer}.{tap.path}")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not tap.is_projection or not isinstance(weight, Tensor):
        where = module_paths(model_type, [site])
        raise MissingSiteError(f"in a '{model_type}' model no projection computes {site} ({where})")

    def own(fused: Tensor) -> Tensor:
        return tap.part_of(fused, _heads(model)).flatten(1)

    by_input = weight.T if isinstance(module, nn.Linear) else weight  # GPT-2's Conv1D keeps [in, out]
    return own(by_input).T, own(bias[None])[0] if isinstance(bias, Tensor) else None


class Placement(NamedTuple):
    """One site of one layer, by its module's full name.

    `outputs` [width]: which of a projection's outputs are the site's own, all but for a fused one; None where
    the site is no projection's output.
    """

    layer: int
    site: Site
    module: str
    outputs: Tensor | None


def placements(model: nn.Module, model_type: str) -> Iterator[Placement]:
    """Where every site of every layer is. Raises MissingSiteError for a family that is not known."""
    require_sites(model_type, frozenset({Site.Q}))
    family = _FAMILIES[model_type]
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for site, tap in family.taps.items():
            module = layer.get_submodule(tap.path)
            weight = getattr(module, "weight", None)
            outputs = None
            if isinstance(weight, Tensor) and tap.is_projection:
                width = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
                outputs = tap.part_of(torch.arange(width)[None], _heads(model)).flatten()
            yield Placement(index, site, f"{family.layers}.{index}.{tap.path}", outputs)


@contextmanager
def tapped(model: nn.Module, model_type: str, adaptation: Adaptation | None) -> Iterator[None]:
    """Routes the model's values through `adaptation` at its sites, for the pass inside the `with`.

    Raises MissingSiteError if the family lacks one, or the pass left one out.
    """
    if adaptation is None:
        yield
        return
    require_sites(model_type, adaptation.sites)
    inside = sorted(adaptation.sites - _OF_ALL_FAMILIES)
    taps: list[_LayerTap] = []
    handles: list[Any] = []
    try:
        if Site.EMBEDDING in adaptation.sites:
            handles.append(_attach_to_embedding(model, adaptation))
        if inside:
            family = _FAMILIES[model_type]
            for index, layer in enumerate(model.get_submodule(family.layers).children()):
                for site in inside:
                    tap = _LayerTap(index, site, family.taps[site], adaptation, _heads(model))
                    handles += tap.attach(layer)
                    taps.append(tap)
        yield
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        if not tap.reached:  # the plain model's answer must not pass for an adapted one
            raise MissingSiteError(f"the pass never called {tap.tap.path} of layer {tap.layer} ({tap.site})")


@dataclass(slots=True)
class _LayerTap:
    """One site of one layer for one pass."""

    layer: int
    site: Site
    tap: _Tap
    adaptation: Adaptation
    heads: int
    source: Tensor | None = None
    reached: bool = False

    def attach(self, layer: nn.Module) -> list[Any]:
        module = layer.get_submodule(self.tap.path)
        if self.tap.is_input:
            return [module.register_forward_pre_hook(self._on_input)]
        handles = [module.register_forward_hook(self._on_output)]
        if self.tap.entry is not None:
            handles.append(layer.get_submodule(self.tap.entry).register_forward_pre_hook(self._on_entry))
        return handles

    def _on_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # what came before needs its output for gradients: OPT's ReLU keeps it
        copied = self.tap.shared or torch.is_grad_enabled()
        entering = args[0].clone() if copied else args[0]
        value = _rows(entering)
        self._apply(value, value)
        return (entering, *args[1:])

    def _on_entry(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.source = _rows(args[0])

    def _on_output(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        source = _rows(args[0]) if self.source is None else self.source
        part = self.tap.part_of(_rows(output), self.heads)
        value = part.flatten(1)  # a copy if by_head: no adapter has to know of heads
        self._apply(value, source)
        if self.tap.by_head:
            part.copy_(value.view(part.shape))

    def _apply(self, value: Tensor, source: Tensor) -> None:
        self.adaptation.apply(self.layer, self.site, value, source)
        self.reached = True


def _heads(model: Any) -> int:
    return int(model.config.num_attention_heads)


def _rows(states: Tensor) -> Tensor:
    """[1, T, width], or [T, width] as OPT's FFN has them, to [T, width]; a view."""
    return states.view(-1, states.shape[-1])


def _attach_to_embedding(model: Any, adaptation: Adaptation) -> Any:
    def on_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        value = _rows(output)
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
