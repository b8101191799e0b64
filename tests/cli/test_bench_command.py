"""`prad bench`: what it offers, and mistakes in one line. What it measures is no test's business."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from bench.known import FLAGS
from prad_cli.bench import BENCHMARKS
from tests.cli.test_command_line import ENVIRONMENT, prad

ROOT = Path(__file__).parents[2]


def test_help_lists_all() -> None:
    ended = prad("bench", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(BENCHMARKS) == sorted(FLAGS)
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
    assert ended.stderr.startswith("error: --rounds: Input should be a valid integer")
    ended = prad("bench", "floor", "--no-such-flag", "3")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No such option: --no-such-flag" in ended.stderr


def test_help_says_what_is_measured_and_by_which_flags() -> None:
    ended = prad("bench", "decode", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for words in ("prad bench decode --smoke", "Time of one decode step, by number of sequences, by context"):
        assert words in ended.stdout
    for words in ("--batches", "[default: 1, 4, 8, 16, 32, 64, 128, 256]", "--smoke", "--out"):
        assert words in ended.stdout


def test_small_sizes_are_those_that_nothing_else_was_said_about() -> None:
    told = FLAGS["table4"](smoke=True, prompt="16").model_dump()
    assert (told["tasks"], told["prompt"], told["out"].name) == ([2], 16, "smoke")
    assert FLAGS["table4"]().model_dump()["tasks"] == [8, 16, 64]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("handoff", {"bursts": ["8y512"]}, "bursts"),
        ("floor", {"rounds": 0}, "greater than or equal to 1"),
        ("quality", {"data": "here", "methods": ["PA", "PAA"]}, "PAA: expected some of PrAd-PA, "),
        ("chunking", {"only": ["no such"]}, "'one pass', 'chunks'"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FLAGS[name](**given)


def test_bursts_are_prompts_by_tokens() -> None:
    assert FLAGS["handoff"](bursts=["8x512", "1x64"]).model_dump()["bursts"] == [(8, 512), (1, 64)]


def test_without_a_checkout_it_says_where_to_run(tmp_path: Path) -> None:
    """As installed: the shipped packages alone, no bench/ beside them."""
    for package in ("prad_cli", "prad", "adapter_registry"):  # what the command imports as it starts
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ended = subprocess.run(
        [sys.executable, "-m", "prad_cli", "bench", "floor"],
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


@pytest.mark.parametrize("name", FLAGS)
def test_every_benchmark_says_what_it_measures_and_has_a_small_size(name: str) -> None:
    module = importlib.import_module(f"bench.{name}")
    assert module.__doc__
    assert FLAGS[name].SMOKE
    assert callable(module.run)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "workers").glob("*.py")), ids=lambda p: p.name)
def test_a_worker_imports_nothing_of_ours(path: Path) -> None:
    """It runs where nothing of ours is installed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    ours = {"bench", "prad", "kvtransfer", "decode_service", "prefill_service", "adapter_registry"}
    ours |= {"local_stack", "prad_cli"}
    assert not {name.split(".")[0] for name in found if name} & ours
