"""What the first `make serve` shows while it sets up: a line for a step, everything where one fails."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
[ "$1" = --version ] && echo "Python 3.11.0" && exit
echo "$@" >>"$CALLS"
echo "Collecting everything, in many lines"
case "$*" in *model.txt*) [ -z "$FAILS" ] || { echo "ERROR: no such wheel" >&2; exit 1; } ;; esac
"""


def install(tmp_path: Path, fails: str = "") -> "subprocess.CompletedProcess[str]":
    python = tmp_path / "python"
    python.write_text(PIP, encoding="utf-8")
    python.chmod(0o755)
    calls = {"CALLS": str(tmp_path / "calls"), "FAILS": fails, "PIP_ARGS": "--index-url http://here"}
    command = [str(ROOT / "locks" / "install"), str(python), "serve"]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env={"PATH": "/usr/bin:/bin", **calls}, check=False
    )


def test_a_line_for_each_step_and_none_of_pips(tmp_path: Path) -> None:
    ended = install(tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "")
    first, *steps, last = ended.stderr.splitlines()
    assert first.startswith("setting up Python 3.11.0")
    assert [step.partition(" ...")[0].strip() for step in steps[::2]] == [
        "what builds packages",
        "the default model",
    ]
    assert len(steps) == 4
    assert "packages of locks/serve.txt" in steps[1]
    assert steps[3].strip().startswith("torch==")
    assert last.startswith("set up in ")
    assert "Collecting" not in ended.stderr
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert ["--require-hashes" in call for call in calls] == [True, True, True, False]
    assert "--index-url http://here" in calls[3]


@pytest.mark.parametrize("said", ["Collecting everything", "ERROR: no such wheel", "PIP_INDEX_URL"])
def test_a_step_that_fails_shows_all_and_how_to_mend_it(tmp_path: Path, said: str) -> None:
    ended = install(tmp_path, fails="yes")
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "FAILED" in ended.stderr
    assert "set up in" not in ended.stderr
