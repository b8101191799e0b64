"""Side by side in one run: every variant once per round, in turn, so that a slow moment hits all; medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import track

K = TypeVar("K")


class Samples(Generic[K]):
    """What each variant took, one number per round, in the unit it was measured in."""

    def __init__(self, values: Mapping[K, Sequence[float]]) -> None:
        self.values = {name: list(each) for name, each in values.items()}

    def __getitem__(self, name: K) -> float:
        """The median."""
        return statistics.median(self.values[name])

    def figures(self, digits: int = 3) -> dict[str, dict[str, Any]]:
        """For the JSON: {name: {"median": m, "rounds": [...]}}."""
        return {
            str(name): {"median": round(self[name], digits), "rounds": [round(v, digits) for v in each]}
            for name, each in self.values.items()
        }


def interleaved(
    variants: Mapping[K, Callable[[], float]],
    rounds: int,
    what: str,
    *,
    warm_up: int = 1,
    patience_s: float = math.inf,
) -> Samples[K]:
    """Calls each variant once per round; a variant returns its own measure. The first rounds warm up.

    Each round begins with another variant. One that took longer than `patience_s` is not asked again.
    """
    values: dict[K, list[float]] = {name: [] for name in variants}
    names = list(variants)
    turns = [
        (number, names[(number + turn) % len(names)])
        for number in range(-warm_up, rounds)
        for turn in range(len(names))
    ]
    for number, name in track(turns, description=what, console=Console(stderr=True), transient=True):
        if any(took > patience_s for took in values[name]):
            continue
        measured = variants[name]()
        if number >= 0:
            values[name].append(measured)
    return Samples(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios, over the rounds that both have: what disturbs a shared machine
    disturbs neighbours in time alike."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """A variant that is measured by the clock."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return measure
