"""The benchmark of a GPU runs where there is none, and asks for one by its name."""

import json
from pathlib import Path

import pytest

from bench.flags import Gpu
from bench.runner import run
from prad.lm import DeviceError


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    path = run("gpu", Gpu(smoke=True, out=tmp_path))
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {row["adapters"] for row in result["passes"]} == {"plain", "PA", "LoRA"}
    assert [row["sequences"] for row in result["steps"]] == [1, 4]
    assert path.with_suffix(".png").exists()


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device 'cuda:99'"):
        run("gpu", Gpu(smoke=True, device="cuda:99", out=tmp_path))
