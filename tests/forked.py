"""`prad ...` as tests start it: the services of a running stack, and commands.

With `--fork`, as `make test` has it, each is forked from one process that has imported everything: what torch
and transformers take to be imported, three to five seconds for each of them, was a third of what the tests
computed. What is forked runs the same command, in a process, a group and an environment of its own, and is
signalled and awaited as any. Without `--fork`, as in `make test-long` and `make coverage`, Python starts anew
for each; so it does always for what tests start by themselves: `prad serve`, `prad train`, the demo.
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

wanted = False
"""Whether `--fork` was given."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.imported"])


def begin() -> None:
    """Starts the process to fork from, which imports while others go on; in the folder of the tests."""
    forkserver.ensure_running()


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
    """Whose services are forked; started again as well."""

    def _begin(self, name: str, arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
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
        out, err = (path.read_text(encoding="utf-8") for path in told)
        return subprocess.CompletedProcess(said, status, out, err)
