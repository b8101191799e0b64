"""What the benchmarks that train can be told; as the others' in flags.py."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from bench.flags import ModelFlags
from bench.kinds import RESULTS
from bench.quality_table import COLUMNS, ROWS


def _of(known: list[str]) -> AfterValidator:
    def check(names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return names

    return AfterValidator(check)


_TASKS = [column.task for column in COLUMNS]
_ROWS = [row.name for row in ROWS]


class Train(ModelFlags):
    SMOKE: ClassVar[dict[str, Any]] = {"rounds": 2, "batch": 2, "methods": ["prad-pa", "prad-prefix"]}

    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    data: Path = Field(description="folder of a task, with train.jsonl")
    methods: list[str] | None = Field(None, description="all if left out")
    batch: int = Field(16, description="examples of a step")
    rounds: int = Field(7, ge=1, description="steps of each variant")


class Quality(ModelFlags):
    SMOKE: ClassVar[dict[str, Any]] = {
        "tasks": ["e2e"],
        "methods": ["PrAd-PA", "PA", "plain model"],
        "size": 0.004,
    }

    out: Path = Field(RESULTS, description="folder of the result; --smoke: bench/results/smoke")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    data: Path = Field(description="folder of the tasks' folders")
    tasks: Annotated[list[str], _of(_TASKS)] = _TASKS
    methods: Annotated[list[str], _of(_ROWS)] = _ROWS
    size: float = Field(1.0, description="this part of the examples")
    threads: int | None = Field(None, description="computing threads; all cores without it")
    beams: int = Field(1, description="3 as in the paper; 1 is greedy")
    cells: int | None = Field(None, description="compute at most so many cells now")
