"""What the first `make serve` shows while it sets up: a line for a step, everything where one fails."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
[ "$1" = --version ] && echo "Python ${SAYS:-3.11.0}" && exit
echo "$@" >>"$CALLS"
echo "Collecting everything, in many lines"
case "$*" in *model.txt*) [ -z "$FAILS" ] || { echo "$FAILS" >&2; exit 1; } ;; esac
"""


def install(tmp_path: Path, fails: str = "", says: str = "") -> "subprocess.CompletedProcess[str]":
    python = tmp_path / "python"
    python.write_text(PIP, encoding="utf-8")
    python.chmod(0o755)
    calls = {
        "CALLS": str(tmp_path / "calls"),
        "FAILS": fails,
        "SAYS": says,
        "PIP_ARGS": "--index-url http://here",
    }
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


@pytest.mark.parametrize(
    ("fails", "fix"),
    [
        ("ERROR: no such wheel", "set PIP_INDEX_URL, or HTTPS_PROXY"),
        ("OSError: [Errno 28] No space left on device", "The disk is full: free some room"),
    ],
)
def test_a_step_that_fails_shows_all_and_how_to_mend_it(fails: str, fix: str, tmp_path: Path) -> None:
    ended = install(tmp_path, fails)
    assert ended.returncode == 1
    for said in ("Collecting everything", "FAILED", fails, fix, "Then the same command again"):
        assert said in ended.stderr
    assert "set up in" not in ended.stderr


@pytest.mark.parametrize("version", ["3.14.0", "3.20.1", "4.0.0"])
def test_a_python_that_is_newer_than_the_locks_is_said_before_anything_is_fetched(
    version: str, tmp_path: Path
) -> None:
    ended = install(tmp_path, says=version)
    assert ended.returncode == 1
    assert f"are for Python 3.11 to 3.13, and this is Python {version}" in ended.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_a_python_that_is_too_old_is_said_before_anything_is_made(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    made = f"{tmp_path / 'venv'}/.made"
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path / 'venv'}", f"PYTHON={old}", made]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode != 0
    assert f"error: Python 3.11 to 3.13 is needed, and {old} is none" in ended.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("user", "there", "said", "installed"),
    [
        (0, False, "installing redis-server", True),
        (1000, False, "sudo apt-get install redis-server", False),
        (1000, True, "", False),
    ],
)
def test_what_the_registrys_tests_need_is_installed_where_it_may(
    tmp_path: Path, user: int, there: bool, said: str, installed: bool
) -> None:
    for name in ("make", "sh", "timeout"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    scripts = {"apt-get": f'echo "$@" >{tmp_path}/asked', "id": f"echo {user}"} | (
        {"redis-server": ""} if there else {}
    )
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!{tmp_path}/sh\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    command = [tmp_path / "make", "-C", ROOT, "--no-print-directory", "redis"]
    ended = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=True, env={"PATH": str(tmp_path)}
    )
    assert said in ended.stdout
    assert bool(ended.stdout) == bool(said)
    assert ended.stderr == ""
    assert (tmp_path / "asked").exists() == installed
