"""`prad ...` as tests start it: the services of a running stack, and commands.

With `--fork`, as `make test` has it, each is forked from one process that has imported everything: what torch
and transformers take to be imported, three to five seconds for each of them, was a third of what the tests
computed. What is forked runs the same command, in a process, a group and an environment of its own, and is
signalled and awaited as any. Without `--fork`, as in `make test-long`, `make test-oldest` and `make
coverage`, Python starts anew for each; so it does always for what tests start by themselves: `prad serve`,
`prad train`, the demo.

What a fork leaves out, and only those see: that `python -m prad_cli` starts, with nothing imported before;
what an import reads from the environment (`OMP_WAIT_POLICY`, `HF_HUB_OFFLINE`); flags of the interpreter; and
what is registered with `atexit`, which a forked process may not run.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from local_stack.stack import Stack
from prad_cli.app import main

ROOT = Path(__file__).parents[1]
wanted = False
"""Whether `--fork` was given."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.imported"])


def begin() -> None:
    """Starts the process to fork from, which imports while others go on."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:  # 3.11 to 3.13 tell it nothing of sys.path, and started in another folder it would find no tests
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _unready() -> str:
    """In a child: why what it was forked from had not imported everything; empty if it had."""
    imported = sys.modules.get("tests.imported")
    if imported is None:
        return "tests.imported was not imported"
    return "; ".join(f"{name}: {why}" for name, why in imported.FAILED.items())


@dataclass(frozen=True)
class Command:
    """`prad WORDS`, as a child is told it: from which file its input comes, and to which both outputs go."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    streams: tuple[str, str, str]
    own_group: bool

    def run(self) -> None:
        """In the child."""
        if self.own_group:
            os.setpgid(0, 0)
        appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for number, path in enumerate(self.streams):
            opened = os.open(path, appending if number else os.O_RDONLY, 0o644)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has given it another
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv = ["prad", *self.words]
        if why := _unready():
            sys.exit(f"the process to fork from (tests/imported.py) is not what it should be: {why}")
        main()


class Forked(subprocess.Popen[bytes]):
    """A command that runs, to be polled, signalled and awaited; nothing of how Popen itself starts one."""

    _child_created = False  # so that nothing of it ends one, either

    def __init__(self, command: Command) -> None:
        self._process = _context.Process(target=command.run, daemon=True)
        self._process.start()
        self.args = command.words
        self.pid = self._process.pid or 0
        self.stdin = self.stdout = self.stderr = None
        self.returncode: Any = None

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status


class ForkedStack(Stack):
    """Whose services are forked; started again as well. None runs within another program."""

    def _begin(self, name: str, arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        if name in self._within:
            raise ValueError(f"{name} cannot be forked within {self._within[name]}: start a Stack instead")
        streams = (os.devnull, log.name, log.name)
        return Forked(Command((name, *arguments), dict(os.environ), streams, own_group=True))


def stack(logs: Path) -> Stack:
    return ForkedStack(logs) if wanted else Stack(logs)


def prad(
    *words: str | Path, environment: Mapping[str, str] | None = None, lines: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Runs `prad WORDS` to its end; `lines` are typed into it."""
    environment = os.environ if environment is None else environment
    said = tuple(map(str, words))
    if not wanted:
        return subprocess.run(
            [sys.executable, "-m", "prad_cli", *said],
            input=lines,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            env=environment,
            check=False,
        )
    with tempfile.TemporaryDirectory() as kept:
        typed, *told = (Path(kept) / name for name in ("typed", "out", "err"))
        typed.write_text(lines, encoding="utf-8", errors="surrogateescape")
        streams = (str(typed), str(told[0]), str(told[1]))
        running = Forked(Command(said, dict(environment), streams, own_group=False))
        try:
            status = running.wait()
        finally:
            running.kill()
        out, err = (path.read_text(encoding="utf-8", errors="surrogateescape") for path in told)
        return subprocess.CompletedProcess(said, status, out, err)
