"""A gate, the goal beyond it, and what bench/results says about them; which there are: bench.asked."""

import json
from collections.abc import Callable, Sequence
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
        reached = [cell for results in kinds for cell in self._reached(results)]
        return [self.what, f"{sign} {self.gate:g}{self.unit}", goal, *reached, self.source]

    def _reached(self, results: Path) -> tuple[str, str]:
        """What was measured on one kind of CPU, and what it reaches."""
        try:
            found = self.measure(json.loads((results / f"{self.source}.json").read_text(encoding="utf-8")))
        except (OSError, LookupError, StopIteration, TypeError):
            # not measured, or before the benchmark had this part, or known only where the kernels compute
            return "–", "–"
        return f"{found:.3g}{self.unit}", self._verdict(found)

    def _verdict(self, found: float) -> str:
        def reached(limit: float) -> bool:
            return found >= limit if self.at_least else found <= limit

        if self.of_floor and found < 1:
            return "gate (the two cannot be told apart)"
        if self.goal is not None and reached(self.goal):
            return "goal"
        return "gate" if reached(self.gate) else "missed"


def table(gates: Sequence[Gate], kinds: Sequence[Path]) -> str:
    """kinds: folders of results, each of a kind of CPU."""
    measured = [heading for kind in kinds for heading in (kind.name, "reached")]
    lines = [["", "gate", "goal", *measured, "by"], ["---"] * (4 + len(measured))]
    lines += [gate.row(kinds) for gate in gates]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
