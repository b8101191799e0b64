"""All adapters of one packed prompt pass, as the forward asks for them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prad.adapters.adapter import Adapter
from prad.adapters.method import Group
from prad.adapters.segments import Span
from prad.adapters.task_tokens import TaskRows
from prad.lm import Site, SiteVectors
from prad.lm.kernels import Kernels


class AdaptedSpan(NamedTuple):
    """`length` rows of the pass from `start` on, a prompt under `adapter`; the `after` rows behind them are
    its generated tokens. Rows in no span are the plain model's.

    `position`: which token of its sequence the first of them is, not 0 in later chunks of a prompt.
    """

    adapter: Adapter
    start: int
    length: int
    position: int = 0
    after: int = 0


class PromptAdaptation:
    """Implements `prad.lm.Adaptation` for any mix of adapters; adapters that fit are applied together."""

    def __init__(
        self,
        spans: Sequence[AdaptedSpan],
        device: torch.device | str,
        kernels: Kernels | None = None,
        task_rows: TaskRows | None = None,
    ) -> None:
        alike: dict[tuple[str, frozenset[str]], dict[Adapter, int]] = {}  # numbered in order
        rows: dict[tuple[str, frozenset[str]], list[Span]] = {}
        for span in sorted(spans, key=lambda span: span.start):
            key = (span.adapter.method.name, span.adapter.own_names)
            numbers = alike.setdefault(key, {})
            number = numbers.setdefault(span.adapter, len(numbers))
            own = Span(span.start, span.start + span.length, number, span.position, span.after)
            rows.setdefault(key, []).append(own)
        self._groups: list[Group] = []
        self._by_site: dict[Site, list[Callable[[int, Site, Tensor, Tensor], None]]] = {}
        if task_rows is not None:
            self._by_site[Site.EMBEDDING] = [task_rows.contribute]
        for key, adapters in alike.items():
            first = next(iter(adapters))
            group = Group(
                first.method,
                tuple(a.config for a in adapters),
                tuple(a.per_layer for a in adapters),
                tuple(rows[key]),
                device,
                kernels,
            )
            self._groups.append(group)
            for site in first.sites:
                self._by_site.setdefault(site, []).append(partial(first.method.contribute, group))

    @classmethod
    def of_prompts(
        cls,
        adapters: Sequence[Adapter | None],
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        device: torch.device | str,
        kernels: Kernels | None = None,
        positions: Sequence[int] | None = None,
        task_rows: TaskRows | None = None,
    ) -> "PromptAdaptation | None":
        """For packed sequences of `lengths`, of which the first `prompt_lengths` rows are adapted: virtual
        tokens and prompt.

        `positions`: that of each one's first row; all at 0 if left out. None if no sequence has an adapter.
        """
        starts = accumulate(lengths[:-1], initial=0)
        firsts = [0] * len(lengths) if positions is None else positions
        spans = [
            AdaptedSpan(adapter, start, prompt, first, length - prompt)
            for adapter, start, length, prompt, first in zip(
                adapters, starts, lengths, prompt_lengths, firsts, strict=True
            )
            if adapter is not None and prompt > 0
        ]
        return cls(spans, device, kernels, task_rows) if spans else None

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self._by_site)

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        for contribute in self._by_site[site]:
            contribute(layer, site, value, source)

    def states(self) -> dict[int, SiteVectors]:
        """After the pass: the request state of spans whose method makes any, by the span's first row."""
        return {
            span.start: state
            for group in self._groups
            for span, state in zip(group.spans, group.method.states(group), strict=True)
            if state
        }
