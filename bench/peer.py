"""A peer in a process of its own, under its own interpreter: started once, asked again and again.

While it is not asked all of its processes are stopped: some wait for work by spinning, on cores that others
are measured on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from local_stack.endings import described_end
from prad.core.errors import PradError

_WORKERS = Path(__file__).parent / "workers"
_STOP_S = 15.0


class PeerError(PradError):
    """A peer did not start, or ended; the message holds the end of what it said."""


class Peer:
    """Use it in a `with`. `versions` are those of the peer's own packages, once it is ready."""

    def __init__(self, worker: str, python: Path | None, options: dict[str, Any], log: Path) -> None:
        self._worker = worker
        self._log = log
        # what `prad` sets for itself is not for others
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
        if python is not None and not python.is_file():
            raise PeerError(f"there is no interpreter {python}")
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python or sys.executable), str(_WORKERS / f"{worker}_worker.py"), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                encoding="utf-8",
                start_new_session=True,  # it may have processes of its own, which end with it
            )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait_ready(self) -> None:
        """Until the model is loaded; several peers load at the same time."""
        self.versions = self._read()["versions"]
        self._signal(signal.SIGSTOP)

    def generate(
        self, prompts: Sequence[Sequence[int]], output: int, adapters: Sequence[str | None]
    ) -> float:
        """Seconds until every prompt has `output` tokens, greedy, whatever the end token says."""
        asked = {"prompts": prompts, "output": output, "adapters": adapters}
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        seconds = float(self._read()["seconds"])
        self._signal(signal.SIGSTOP)
        return seconds

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> PeerError:
        end = described_end(self._process.wait())
        tail = "\n".join(
            f"  {line}" for line in self._log.read_text(errors="replace", encoding="utf-8").splitlines()[-12:]
        )
        return PeerError(f"the worker {self._worker} {end}:\n{tail}")

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self._signal(signal.SIGKILL)  # whoever is still there
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To all processes of the peer."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
