"""All adapters of one packed prompt pass, as the forward asks for them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prad.adapters.adapter import Adapter
from prad.adapters.method import Group
from prad.adapters.rows import AdaptedRows
from prad.lm import Site


class AdaptedSpan(NamedTuple):
    """`length` rows of the pass from `start` on, under `adapter`. Rows in no span are the plain model's."""

    adapter: Adapter
    start: int
    length: int


class PromptAdaptation:
    """Implements `prad.lm.Adaptation` for any mix of adapters; adapters that fit are applied together."""

    def __init__(self, spans: Sequence[AdaptedSpan], device: torch.device | str) -> None:
        own_spans: dict[Adapter, list[tuple[int, int]]] = {}
        for span in spans:
            own_spans.setdefault(span.adapter, []).append((span.start, span.length))
        alike: dict[object, list[Adapter]] = {}
        for adapter in own_spans:
            shapes = tuple((name, p.shape) for name, p in sorted(adapter.parameters.items()))
            alike.setdefault((adapter.method.name, shapes), []).append(adapter)
        self._by_site: dict[Site, list[Group]] = {}
        for adapters in alike.values():
            group = Group(
                adapters[0].method,
                tuple(a.config for a in adapters),
                tuple(a.parameters for a in adapters),
                AdaptedRows.of_spans([own_spans[a] for a in adapters], device),
            )
            for site in adapters[0].sites:
                self._by_site.setdefault(site, []).append(group)

    @classmethod
    def of_prompts(
        cls,
        adapters: Sequence[Adapter | None],
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        device: torch.device | str,
    ) -> "PromptAdaptation | None":
        """For packed sequences of `lengths`, of which the first `prompt_lengths` rows are adapted.

        None if no sequence has an adapter.
        """
        starts = accumulate(lengths[:-1], initial=0)
        spans = [
            AdaptedSpan(adapter, start, prompt)
            for adapter, start, prompt in zip(adapters, starts, prompt_lengths, strict=True)
            if adapter is not None
        ]
        return cls(spans, device) if spans else None

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self._by_site)

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> Tensor:
        for group in self._by_site[site]:
            value = group.method.contribute(group, layer, site, value, source)
        return value
