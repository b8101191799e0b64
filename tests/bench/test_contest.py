"""What a contest writes down beside times: the pages that a process had to wait for, turn by turn."""

import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.contest import Contestant, contest
from bench.flags import ShapeFlags
from bench.own_engine import OwnEngine
from bench.serving import major_faults
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels

FAULTS = {1: 5, 4: 70}
"""By tokens out: of the prompt passes alone, and of all of it."""


def test_each_turn_has_its_own(tiny_model: Callable[[str], Path], kernels: Kernels) -> None:
    """Between two turns of a process others have theirs, and it may wait for pages then, too."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    model.accelerate(kernels)
    engine, so_far = OwnEngine(model), 0

    def generate(prompts: Sequence[Sequence[int]], output: int, _: Sequence[str | None]) -> float:
        nonlocal so_far
        so_far += FAULTS.get(output, 1000)  # 1000: while it warms up
        return engine.generate(prompts, output)

    def told() -> int:
        nonlocal so_far
        return so_far

    def disturbed(prompts: Sequence[Sequence[int]], output: int, _: Sequence[str | None]) -> float:
        nonlocal so_far
        so_far += 100_000
        return engine.generate(prompts, output)

    everybody = {
        "ours": Contestant(generate, [None] * 2, told),
        "another": Contestant(disturbed, [None] * 2),
    }
    shape = ShapeFlags(prompt=8, output=4, rounds=3)
    ours, another, floor = contest(everybody, shape, model, "a contest")
    assert ours["major_faults"] == 70
    assert ours["rounds_major_faults"] == {"prefill": [5, 5, 5], "total": [70, 70, 70]}
    assert not {"major_faults", "rounds_major_faults"} & (another.keys() | floor.keys())


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="there is no /proc")
def test_they_are_those_of_the_system() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found = major_faults(os.getpid())
    assert found is not None
    assert before <= found <= resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def test_nobody_counts_those_of_a_process_that_is_not_there() -> None:
    assert major_faults(2**30) is None
