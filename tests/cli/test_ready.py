"""What `prad serve` says at the end: addresses, tasks, memory, commands that can be pasted."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prad_cli.ready import Addresses, Ready, command_name, memory_mib, model_said, threads_said
from prad_cli.serve import _Here

AT = Addresses.of("0.0.0.0", 8000, 8001, 8002)


def said(**more: Any) -> str:
    console = Console(file=io.StringIO(), width=60)
    given: dict[str, Any] = {
        "at": AT,
        "host": "127.0.0.1",
        "tasks": ["e2e", "sentiment"],
        "asked": False,
        "logs": Path("/logs"),
        "admin_token": Path("/token"),
        "about": {"model": "small, [bfloat16]"},
        "pids": {"decode": os.getpid()},
    }
    Ready(**given | more).say(console.print)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_and_commands_in_lines_that_nothing_breaks() -> None:
    lines = said().splitlines()
    assert "  API      http://127.0.0.1:8000/v1   fields http://127.0.0.1:8000/docs" in lines
    assert "  console  http://127.0.0.1:8001/console" in lines
    assert "  tasks    e2e, sentiment" in lines
    assert "  model    small, [bfloat16]" in lines
    metrics = " ".join(f"http://127.0.0.1:{port}/metrics " for port in (8000, 8001, 8002)).rstrip()
    assert f"  metrics  {metrics}" in lines
    curls = [line for line in lines if line.startswith("  curl ")]
    assert len(curls) == 3
    assert all(line.endswith("}'") for line in curls)
    assert any(line.endswith("chat sentiment --url http://127.0.0.1:8000") for line in lines)
    assert any("top --api http://127.0.0.1:8000 --registry" in line for line in lines)
    assert lines[-1] == "Ctrl-C stops everything"


def test_no_console_is_named_that_is_off() -> None:
    assert "/console" not in said(console=False)


def test_no_tasks_and_many() -> None:
    assert "none yet: prad adapter push DIR --task NAME" in said(tasks=[])
    many = said(tasks=[f"t{i}" for i in range(20)])
    assert "t11 and 8 more (prad adapter list)" in many
    assert "t12" not in many


def test_who_is_asked_for_a_key() -> None:
    asked = said(asked=True, host="0.0.0.0")
    assert "the API asks everyone for one: prad keys create NAME (with PRAD_TOKEN_FILE=/token" in asked
    assert '-H "authorization: Bearer $PRAD_API_KEY"' in asked
    assert "the API listens on 0.0.0.0: whoever reaches it" in said(host="0.0.0.0")
    assert "whoever" not in said()


def test_the_command_as_a_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/prad_cli/__main__.py"])
    assert command_name().endswith(" -m prad_cli")
    program = tmp_path / "bin" / "prad"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert command_name() == "bin/prad"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name() == "prad"


def test_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRAD_PREFILL_THREADS", raising=False)
    monkeypatch.setenv("PRAD_DECODE_THREADS", "3")
    monkeypatch.delenv("PRAD_PREFILL_WEIGHTS", raising=False)
    monkeypatch.setenv("PRAD_DECODE_WEIGHTS", "int8")
    assert threads_said(None).startswith("prefill as torch chooses, decode 3; ")
    assert threads_said(2).startswith("prefill 2, decode 2; ")
    said = model_said("small", "bfloat16", None, None)
    assert said == "small, bfloat16, weights of prefill full, of decode int8"
    said = model_said("small", "bfloat16", "int4", "full")
    assert said == "small, bfloat16, weights of prefill int4, of decode full"
    monkeypatch.setenv("PRAD_PREFILL_WEIGHTS", "int8")
    assert "of prefill int8" in model_said("small", "bfloat16", None, None)


def test_memory_of_a_process() -> None:
    held = memory_mib(os.getpid())
    assert held is None or held > 1
    assert memory_mib(2**22 + 1) is None


def test_what_services_warn_of_is_not_left_to_their_logs() -> None:
    lines = said(warned=[f"decode: torch computes, slower [{number}]" for number in range(9)]).splitlines()
    assert lines.count("  warning  decode: torch computes, slower [0]") == 1
    assert sum(line.startswith("  warning  ") for line in lines) == 6


def test_an_adapter_that_is_named_instead_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prad.json").touch()
    console = Console(file=io.StringIO(), width=60)
    _Here(tmp_path, AT, tmp_path / "mine", "127.0.0.1", unprotected=False).warn(console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"it is an adapter itself, name the folder that it lies in ({tmp_path})" in said
