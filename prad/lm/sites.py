"""What acts on a pass from outside the model, and how the model asks it.

The model knows the places (`families`), never the adapters: a pass receives one `Adaptation` and asks it at
each site it names. The taps live for one pass only, so nothing stays behind on the frozen model. A prompt
pass gets its adapters so; a decode step gets request state, vectors that belong to one request and scale its
rows (`RowScaling`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prad.lm.errors import MissingSiteError
from prad.lm.families import FAMILIES, Site, Tap
from prad.lm.kv import KVTarget

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


def require_sites(model_type: str, sites: frozenset[Site], method: str = "the adapter") -> None:
    """Raises MissingSiteError unless the family `model_type` has all of the `sites` that `method` acts on."""
    sites -= _OF_ALL_FAMILIES
    if not sites:
        return
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
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
    family = FAMILIES.get(model_type)
    if family is None:
        return "modules that adapters do not know"
    return ", ".join(dict.fromkeys(f"{family.layers}.*.{family.taps[site].path}" for site in sites))


def projection(model: nn.Module, model_type: str, layer: int, site: Site) -> tuple[Tensor, Tensor | None]:
    """Frozen weight [out, in] and bias [out] of the projection whose output is `site`.

    Views, or copies where the parts of each head lie side by side. Raises MissingSiteError if the family does
    not have the site, or no projection computes it.
    """
    require_sites(model_type, frozenset({site}))
    family = FAMILIES[model_type]
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
    family = FAMILIES[model_type]
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
            family = FAMILIES[model_type]
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
    tap: Tap
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


SiteVectors = Mapping[Site, Tensor]
"""One request's vectors by site, [layers, width of the site], contiguous, in the model's dtype."""


class RowScaling:
    """An `Adaptation` of a decode step: row i is scaled by the vectors of its sequence, if it has any.

        x' = x ⊙ (1 + v)

    They depend on a prompt, not on a weight: a prompt pass makes them, and nothing here knows how. v is what
    a row changes by, as near 1 bf16 keeps steps of 1/128 only.
    """

    def __init__(self, rows: Sequence[SiteVectors | None]) -> None:
        """rows: one per row of the step; each may have vectors at sites of its own."""
        self._rows = [row or {} for row in rows]
        self.sites = frozenset(site for row in self._rows for site in row)

    @classmethod
    def of(cls, rows: Sequence[SiteVectors | None]) -> "RowScaling | None":
        """None if no row has state: then a step costs what it costs without."""
        return cls(rows) if any(rows) else None

    @property
    def ordered(self) -> tuple[Site, ...]:
        """The sites, in the order of `addresses`."""
        return tuple(sorted(self.sites))

    @cached_property
    def addresses(self) -> Tensor:
        """Where the vectors lie, int64 [sites, rows]; 0 for none. Lives as long as this."""
        return torch.tensor(
            [[row[site].data_ptr() if site in row else 0 for row in self._rows] for site in self.ordered]
        )

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        rows, vectors = self._stacked[site]
        value[rows] *= 1 + vectors[:, layer].float()

    @cached_property
    def _stacked(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """By site: the rows [n] that have vectors there, and those [n, layers, width]."""
        stacked = {}
        for site in self.sites:
            having = [(i, row[site]) for i, row in enumerate(self._rows) if site in row]
            vectors = torch.stack([vector for _, vector in having])
            stacked[site] = torch.tensor([i for i, _ in having], device=vectors.device), vectors
        return stacked


_SCALED = (Site.Q, Site.K, Site.V, Site.GATE, Site.UP)


def state_widths(module: nn.Module, model_type: str) -> dict[Site, int]:
    """The sites at which a model takes request state, with their widths."""
    widths = {}
    for site in _SCALED:
        try:
            weight, _ = projection(module, model_type, 0, site)
        except MissingSiteError:
            continue
        widths[site] = weight.shape[0]
    return widths
