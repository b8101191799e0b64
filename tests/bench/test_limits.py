"""The limits of the hardware: loops that this CPU runs, and times that are made of them."""

import platform
from pathlib import Path

import pytest
import torch

from bench import limits as measured
from bench.floor import Ground
from bench.limits import Hardware, build, limits
from bench.rounds import Samples, interleaved
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from prad.lm.kernels.cpus import KINDS, CpuKind

HERE = [kind for kind in KINDS if kind.machine == platform.machine()]


def test_every_loop_of_this_cpu_multiplies() -> None:
    found = limits()
    assert found is not None, "the tests need a compiler"
    assert "float32" in found.by
    for products in found.by:
        assert 0 < found.giga(products)() < 1e3


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_the_loops_are_compiled_for_every_kind_of_cpu(kind: CpuKind, tmp_path: Path) -> None:
    build(tmp_path / "limits.so", *kind.flags)


def test_of_two_ways_the_faster_is_the_limit() -> None:
    hardware = Hardware(1)
    took = Samples(
        {("float32", 0): [2.0, 4.0], ("bf16", 0): [1.0, 1.0], ("read", 0): [3.0], ("sum", 0): [9.0]}
    )
    assert hardware.read_s(took, 2 << 20) == [6.0]
    assert hardware.giga_s(took, "float32") == [2.0, 4.0]


def test_our_gemms_are_compared_with_the_peak_and_with_the_bandwidth(
    packable: Path, kernels: Kernels
) -> None:
    model = LanguageModel.load(packable, dtype=torch.bfloat16)
    model.accelerate(kernels)
    ground = Ground(model, [1, 16, 64], bandwidth_mib=1)
    took = interleaved(ground.kinds, 2, "floor")
    one, some, many = ground.figures(took)["gemms"]
    assert "own_of_bandwidth" in one
    assert "own_of_peak" not in one
    assert not {"own_of_bandwidth", "own_of_peak"} & set(some)
    assert "own_of_peak" in many
    assert many["limit_ms"] > 0
    limits_s, gemms_s = ground.limits_s(took, 64, 100), ground.gemms_limits_s(took, 64)
    assert limits_s is not None
    assert gemms_s is not None
    assert all(whole > gemms for whole, gemms in zip(limits_s, gemms_s, strict=True))


def test_without_a_compiler_there_is_a_floor_and_no_limit(
    packable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "limits", lambda: None)
    ground = Ground(LanguageModel.load(packable, dtype=torch.float32), [1], bandwidth_mib=1)
    took = interleaved(ground.kinds, 1, "floor")
    assert ground.limits_s(took, 1, 10) is None
    figures = ground.figures(took)
    assert figures["bandwidth_gb_s"] > 0
    assert figures["peak_of"] is None
