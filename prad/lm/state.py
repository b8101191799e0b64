"""Request state: vectors that belong to one request and scale its rows at named sites.

    x' = x ⊙ (1 + v)

They depend on a prompt, not on a weight: a prompt pass makes them, and decode steps scale each sequence's row
by its own. v is what a row changes by, as near 1 bf16 keeps steps of 1/128 only. Nothing here knows what made
them.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from prad.lm.errors import MissingSiteError
from prad.lm.sites import Site, projection

SiteVectors = Mapping[Site, Tensor]
"""One request's vectors by site, [layers, width of the site], contiguous, in the model's dtype."""


class RowScaling:
    """An `Adaptation` of a decode step: row i is scaled by the vectors of its sequence, if it has any."""

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


_SITES = (Site.Q, Site.K, Site.V, Site.GATE, Site.UP)


def state_widths(module: nn.Module, model_type: str) -> dict[Site, int]:
    """The sites at which a model takes request state, with their widths."""
    widths = {}
    for site in _SITES:
        try:
            weight, _ = projection(module, model_type, 0, site)
        except MissingSiteError:
            continue
        widths[site] = weight.shape[0]
    return widths
