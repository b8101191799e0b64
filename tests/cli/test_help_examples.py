"""Every command's --help shows how it is typed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from prad_cli.app import app
from prad_cli.registry_files import COMMANDS

OF_REGISTRY = [("registry", name) for name in COMMANDS]
"""Behind a command that reads its own arguments."""


def paths(command: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield at
    if isinstance(command, TyperGroup):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from paths(command.get_command(context, name), (*at, name))


ALL = [*paths(typer.main.get_command(app)), *OF_REGISTRY]


def test_all_are_walked() -> None:
    assert {("chat",), ("top",), ("doctor",), ("bench", "load"), ("adapter", "push"), ("serve",)} <= set(ALL)
    assert len(ALL) > 50


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(("prad", *path)))
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    ended = CliRunner().invoke(app, [*path, "--help"], prog_name="prad", terminal_width=200)
    assert ended.exit_code == 0, ended.output
    text = " ".join(ended.output.split())
    assert "Example" in text
    example = text.partition("Example")[2]
    assert " ".join(("prad", *path)) in example, "the command itself is shown"


def test_a_shell_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = CliRunner().invoke(app, ["--help"], prog_name="prad", terminal_width=200)
    assert "--install-completion" in ended.output
    # the shell that runs this may be none
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="prad")
    assert (script.exit_code, "_PRAD_COMPLETE=complete_bash" in script.output) == (0, True)


COMPLETED = """\
eval "$(prad --show-completion)"
for line in "prad ch" "prad chat --tim" "prad adapter promo"; do
    COMP_WORDS=($line) COMP_CWORD=$(($(wc -w <<<"$line") - 1)) COMPREPLY=()
    _prad_completion prad
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_does(tmp_path: Path) -> None:
    """With the script that it is given for itself."""
    command = tmp_path / "prad"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m prad_cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    there = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    there["PYTHONPATH"] = os.pathsep.join(sys.path)
    asked = ["bash", "--norc", "-c", COMPLETED]
    ended = subprocess.run(asked, env=there, capture_output=True, encoding="utf-8", check=True, cwd=tmp_path)
    assert ended.stdout.split() == ["chat", "--timings", "promote"], ended.stderr
