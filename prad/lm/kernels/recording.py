"""A pass recorded once and run as often as wanted: one call into the library, no Python in between."""

from typing import Any

import torch
from torch import Tensor

from prad.lm.kernels.calls import Call, Calls, PagedView
from prad.lm.kernels.library import Kernels


class Recording(Calls):
    """Keeps calls instead of running them.

    Whatever they read and write stays theirs; `run` may be given fewer rows than were recorded.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._memory: dict[str, Tensor] = {}
        self._calls: list[Call] = []
        self._used: list[Any] = []
        self._list: Any = None

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every result of that name."""
        if name not in self._memory:
            self._memory[name] = torch.empty(rows, width, dtype=dtype)
        kept = self._memory[name]
        assert kept.shape == (rows, width), f"{name} changed its shape from {tuple(kept.shape)}"
        return kept

    def _take(self, call: Call, rows: int, used: tuple[Any, ...], view: PagedView | None) -> None:
        self._calls.append(call)
        self._used += used

    def run(self, rows: int, view: PagedView) -> None:
        """All calls in order, on the first `rows` rows of what they were recorded with."""
        if self._list is None:
            self._list = (Call * len(self._calls))(*self._calls)
        self._kernels.run(self._list, rows, view)
