"""What `make bench-smoke` runs comes to its end, on a tiny model, and so does one that takes too long on a
real one; what they say is no test's business."""

import json
import re
from pathlib import Path

import pytest

from bench.flags import ModelFlags
from bench.known import FLAGS
from bench.runner import run
from prad.lm.kernels.build import built
from tests.cache import CACHE

ROOT = Path(__file__).parents[2]
SMOKE = re.search(r"^SMOKE \?= ([a-z ]+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
NAMES = SMOKE[1].split() if SMOKE else []


@pytest.fixture(scope="module")
def flags(packable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A cache of its own with the kernels of all tests."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "kernels").symlink_to(built(CACHE).parent)
    return {"smoke": True, "model": str(packable), "cache_dir": cache}


def test_there_are_some() -> None:
    assert len(NAMES) > 3
    assert set(NAMES) <= set(FLAGS)


@pytest.mark.parametrize("name", [*NAMES, "rounding"])
def test_a_benchmark_runs(name: str, flags: dict[str, object], tmp_path: Path) -> None:
    arguments = FLAGS[name](**flags, out=tmp_path)
    assert isinstance(arguments, ModelFlags)
    path = run(name, arguments)
    assert path == tmp_path / f"{name}.json"
    assert json.loads(path.read_text(encoding="utf-8"))["setting"]["cpu"]
    assert path.with_suffix(".png").exists()
