"""`prad bench`: what it offers, and mistakes in one line. What it measures is no test's business."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.runner import NAMES
from prad.cli.bench import BENCHMARKS
from tests.cli.test_command_line import ENVIRONMENT, prad

ROOT = Path(__file__).parents[2]


def test_help_lists_all() -> None:
    ended = prad("bench", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(BENCHMARKS) == sorted(NAMES)
    for name, text in BENCHMARKS.items():
        assert f" {name} " in ended.stdout
        assert text in ended.stdout


def test_an_unknown_benchmark_is_named() -> None:
    ended = prad("bench", "no-such")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No such command 'no-such'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_flag_is_named() -> None:
    ended = prad("bench", "floor", "--rounds", "many")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == (
        "prad bench floor: error: argument --rounds: invalid int value: 'many'"
    )


def test_without_a_checkout_it_says_where_to_run(tmp_path: Path) -> None:
    """As installed: the package alone, no bench/ beside it."""
    shutil.copytree(ROOT / "prad", tmp_path / "prad", ignore=shutil.ignore_patterns("__pycache__"))
    ended = subprocess.run(
        [sys.executable, "-m", "prad", "bench", "floor"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the benchmarks are part of a checkout only")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_says_what_it_measures_and_has_a_small_size(name: str) -> None:
    module = importlib.import_module(f"bench.{name}")
    assert module.__doc__
    assert module.SMOKE
    assert callable(module.run)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "workers").glob("*.py")), ids=lambda p: p.name)
def test_a_worker_imports_nothing_of_ours(path: Path) -> None:
    """It runs where nothing of ours is installed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    ours = {"bench", "prad", "kvtransfer", "decode_service", "prefill_service", "adapter_registry"}
    assert not {name.split(".")[0] for name in found if name} & ours
