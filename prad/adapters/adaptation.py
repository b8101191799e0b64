"""Adapters in memory, and all those of one packed prompt pass, as the forward asks for them.

Task tokens go with any method: named places in an artefact's template with learned input embeddings (the
paper's appendix A).

    x_i = E[row]      E [task tokens, embedding width], in the place of an embedding

They are tokens like others to positions, chunks, cached blocks and the hand-off. In a prompt they have ids
that no vocabulary has (`prad.artefact.task_token_id`); the model gets placeholders, and `TaskRows` puts what
was learned in their place: see `split_task_tokens`. Generated tokens are never among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prad.adapters.method import INPUT, Group, LayerParameters, Method, MethodConfig, Parameters
from prad.adapters.segments import Span
from prad.artefact import task_token_id
from prad.lm import Site, SiteVectors
from prad.lm.kernels import Kernels

TASK_TOKENS = f"{INPUT}task_tokens"
"""What adapters call E, a parameter [1, task tokens, embedding width] beside their method's own."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A method, its configuration and its parameters [layers, ...] on the model's device, in dtypes as
    `kept_in` says, with the task tokens' embeddings if it has any.

    Compared by identity: two loads of the same file are two adapters.
    """

    method: Method
    config: MethodConfig
    parameters: Parameters

    @property
    def sites(self) -> frozenset[Site]:
        return self.method.sites(self.config)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that every prompt gets in front; in a pass `placeholders` stand for them."""
        return self.method.virtual_tokens(self.config)

    @cached_property
    def task_embeddings(self) -> Tensor | None:
        """[task tokens, embedding width]"""
        return self.parameters[TASK_TOKENS][0] if TASK_TOKENS in self.parameters else None

    @cached_property
    def own_names(self) -> frozenset[str]:
        """Of its method's parameters."""
        return frozenset(self.parameters) - {TASK_TOKENS}

    @cached_property
    def per_layer(self) -> LayerParameters:
        return {name: stacked.unbind(0) for name, stacked in self.parameters.items()}

    @property
    def state_widths(self) -> dict[Site, int]:
        """See `Method.state_widths`."""
        return self.method.state_widths(self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters.values())


class TaskRows(NamedTuple):
    """The rows [n] of a pass that are task tokens, and what they are [n, embedding width]."""

    rows: Tensor
    vectors: Tensor

    @classmethod
    def of(
        cls,
        tables: Sequence[Tensor | None],
        sequences: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> "TaskRows | None":
        """Of packed sequences of ids, each with its own adapter's E. None if there are no task tokens."""
        rows: list[int] = []
        parts: list[Tensor] = []
        start = 0
        for table, ids in zip(tables, sequences, strict=True):
            if table is not None and (places := [i for i, token in enumerate(ids) if token < 0]):
                rows += [start + i for i in places]
                parts.append(table[[task_token_id(ids[i]) for i in places]])  # its own inverse
            start += len(ids)
        return cls(torch.tensor(rows, device=device), torch.cat(parts)) if rows else None

    def contribute(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        """As `Method.contribute`, at the site EMBEDDING."""
        value.index_copy_(0, self.rows, self.vectors.to(value.dtype))


def split_task_tokens(
    tables: Sequence[Tensor | None], sequences: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[list[Sequence[int]], TaskRows | None]:
    """Packed sequences as the model gets them, with placeholders for task tokens, and the rows of these.

    tables: E of each sequence's own adapter. Which ids the placeholders are does not matter.
    """
    pairs = zip(tables, sequences, strict=True)
    ids = [own if table is None else tuple(max(token, 0) for token in own) for table, own in pairs]
    return ids, TaskRows.of(tables, sequences, device)


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
