"""A gate, the goal beyond it, and what bench/results says about them; which there are: bench.asked."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """`measure` reads it off the result `source`; `unit` stands behind the numbers."""

    what: str
    gate: float
    goal: float | None
    unit: str
    source: str
    measure: Callable[[Any], float]
    at_least: bool = False
    of_floor: bool = False

    def row(self, kinds: Sequence[Path]) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        goal = "–" if self.goal is None else f"{sign} {self.goal:g}{self.unit}"
        reached = [self._reached(results) for results in kinds]
        return [self.what, f"{sign} {self.gate:g}{self.unit}", goal, *reached, self.source]

    def _reached(self, results: Path) -> str:
        """What was measured on one kind of CPU, and what it reaches."""
        try:
            found = self.measure(json.loads((results / f"{self.source}.json").read_text(encoding="utf-8")))
        except (OSError, LookupError, StopIteration, TypeError):
            # not measured, or before the benchmark had this part, or known only where the kernels compute
            return "–"
        return f"{found:.3g}{self.unit}, {self._verdict(found)}"

    def _verdict(self, found: float) -> str:
        def reached(limit: float) -> bool:
            return found >= limit if self.at_least else found <= limit

        if self.of_floor and found < 1:
            return "gate (not to be told apart)"
        if self.goal is not None and reached(self.goal):
            return "goal"
        return "gate" if reached(self.gate) else "missed"


def table(gates: Sequence[Gate], kinds: Sequence[Path]) -> str:
    """kinds: folders of results, each of a kind of CPU. Below the table: how old each of them is."""
    lines = [["", "gate", "goal", *(kind.name for kind in kinds), "by"], ["---"] * (4 + len(kinds))]
    lines += [gate.row(kinds) for gate in gates]
    sources = list(dict.fromkeys(gate.source for gate in gates))
    ages = [f"`{kind.name}`: {said}." for kind in kinds if (said := ", ".join(_ages(kind, sources)))]
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *ages])


def _ages(kind: Path, sources: Sequence[str]) -> Iterator[str]:
    """Commit and date of each result that there is."""
    for source in sources:
        if (file := kind / f"{source}.json").is_file():
            setting = json.loads(file.read_text(encoding="utf-8"))["setting"]
            yield f"{source} {setting['commit']} ({setting['when'][:10]})"
