"""A peer in a process of its own, under its own interpreter: started once, asked again and again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

_WORKERS = Path(__file__).parent / "workers"
_STOP_S = 15.0


class PeerError(Exception):
    """A peer did not start, or ended; the message holds the end of what it said."""


class Peer:
    """Use it in a `with`. `versions` are those of the peer's own packages, once it is ready."""

    def __init__(self, worker: str, python: Path | None, options: dict[str, Any], log: Path) -> None:
        self._log = log
        # what `prad` sets for itself is not for others
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python or sys.executable), str(_WORKERS / f"{worker}_worker.py"), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
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

    def generate(
        self, prompts: Sequence[Sequence[int]], output: int, adapters: Sequence[str | None]
    ) -> float:
        """Seconds until every prompt has `output` tokens, greedy, whatever the end token says."""
        asked = {"prompts": prompts, "output": output, "adapters": adapters}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> PeerError:
        status = self._process.wait()
        tail = "\n".join(f"  {line}" for line in self._log.read_text(errors="replace").splitlines()[-12:])
        return PeerError(f"{' '.join(self._process.args[:2])} ended with status {status}:\n{tail}")

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):  # whoever is still there
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
