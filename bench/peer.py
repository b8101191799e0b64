"""Peers in processes of their own, under their own interpreters: started once, asked again and again.

While one is not asked all of its processes are stopped: some wait for work by spinning, on cores that others
are measured on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from local_stack.endings import described_end
from prad.core.errors import PradError

WORKERS = Path(__file__).parent / "workers"
_STOP_S = 15.0
_LOG_LINES = 12


class PeerError(PradError):
    """A peer did not start, or ended; the message holds the end of what it said."""


class PeerProgram:
    """A program of others, with its log; it may have processes of its own, which end with it. Use it in a
    `with`. `talks`: whether it reads its stdin, whose end ends it, and answers on stdout."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        talks: bool = False,
    ) -> None:
        self._name = name
        self._log = log
        require_interpreter(Path(command[0]))
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else said,
                stderr=said,
                text=True,
                env={**others_environment(), **environment},
                encoding="utf-8",
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        if self.process.stdin is None:
            self.process.terminate()
        else:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        self._signal(signal.SIGKILL)  # whoever is still there
        self.process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Paused again behind it, unless what is inside fails."""
        self._signal(signal.SIGCONT)
        yield
        self.pause()

    def ended(self) -> PeerError:
        """Why, once it has ended or closed its stdout."""
        end = described_end(self.process.wait())
        return PeerError(f"{self._name} {end}:\n{last_lines(self._log)}")

    def _signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Peer(PeerProgram):
    """A worker that holds a model, or a library. `versions`: of its own packages, once it is ready."""

    def __init__(self, worker: str, python: Path | None, options: dict[str, Any], log: Path) -> None:
        command = [str(python or sys.executable), str(WORKERS / f"{worker}_worker.py"), json.dumps(options)]
        super().__init__(f"the worker {worker}", command, log, talks=True)
        self.versions: dict[str, str] = {}

    def wait_ready(self) -> None:
        """Until the model is loaded; several peers load at the same time."""
        self.versions = self._read()["versions"]
        self.pause()

    def generate(
        self, prompts: Sequence[Sequence[int]], output: int, adapters: Sequence[str | None]
    ) -> float:
        """Seconds until every prompt has `output` tokens, greedy, whatever the end token says."""
        return self.ask({"prompts": prompts, "output": output, "adapters": adapters})

    def ask(self, message: Mapping[str, object]) -> float:
        """Seconds that the worker took for what its own docstring says of such a message."""
        requests = self.process.stdin
        assert requests is not None
        with self.awake():
            try:
                requests.write(json.dumps(message) + "\n")
                requests.flush()
            except BrokenPipeError as error:
                raise self.ended() from error
            return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        answers = self.process.stdout
        assert answers is not None
        line = answers.readline()
        if not line:
            raise self.ended()
        answer: dict[str, Any] = json.loads(line)
        return answer


def require_interpreter(python: Path) -> None:
    if not python.is_file():
        raise PeerError(f"there is no interpreter {python}")


def others_environment() -> dict[str, str]:
    """Ours, without what `prad` sets for itself."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_WAIT_POLICY")}


def last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines)
