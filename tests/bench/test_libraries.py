"""Others' products beside ours: all are measured, and libxsmm's are the products that they are called."""

import json
from pathlib import Path

import pytest
import torch

from bench.flags import Libraries
from bench.libraries import Xsmm
from bench.runner import run
from prad.lm.kernels.build import built
from tests.cache import CACHE

ARCHIVE = Path("/usr/lib/libxsmm.a")


def test_everybody_here_is_measured(packable: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").symlink_to(built(CACHE).parent)
    told = {"smoke": True, "model": str(packable), "cache_dir": tmp_path, "out": tmp_path / "out"}
    result = json.loads(run("libraries", Libraries.model_validate(told)).read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert {"ours, bfloat16", "ours, int8", "ours, int4", "ours, float32", "torch, float32"} <= set(rows)
    for row in rows.values():
        assert {"rows_1_ms", "rows_8_ms"} <= set(row)
    assert rows["ours, bfloat16"]["times_ours_8"] == 1


@pytest.mark.skipif(not ARCHIVE.exists(), reason="Debian's libxsmm-dev is not installed")
def test_libxsmm_multiplies(tmp_path: Path) -> None:
    weights = [torch.randn(out, width).bfloat16() for out, width in ((64, 32), (100, 96), (8, 96))]
    xsmm = Xsmm(ARCHIVE, tmp_path, weights)
    for rows in (1, 7, 64, 65, 200):
        inputs, room = {width: torch.randn(rows, width) for width in (32, 96)}, xsmm.room(rows)
        xsmm.multiply(inputs, room)
        for w, made in zip(weights, room, strict=True):
            torch.testing.assert_close(made, inputs[w.shape[1]] @ w.float().T, rtol=1e-4, atol=1e-4)
