"""Many streamed requests at set times, from a process of their own, and what their clients felt."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import pairwise
from typing import Any, Self

import numpy

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request; times in seconds since its run began. `events_s`: when each streamed event arrived;
    `error`: why there is no whole answer, if so."""

    sent_s: float
    done_s: float
    events_s: tuple[float, ...]
    tokens: int
    error: str = ""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Answer":
        error = ""
        if told["status"] != HTTPStatus.OK or not told["tokens"]:
            error = f"answered {told['status'] or 'not at all'}: {told['said']}"
        return cls(told["sent_s"], told["done_s"], tuple(told["events_s"]), told["tokens"], error)

    @property
    def first_s(self) -> float:
        """From the request to its first token; of one that was not streamed, to its end."""
        return (self.events_s[0] if self.events_s else self.done_s) - self.sent_s

    @property
    def between_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.events_s)]

    @property
    def mean_between_s(self) -> float:
        """For each token behind the first: an event may hold more than one."""
        return (self.done_s - self.sent_s - self.first_s) / max(self.tokens - 1, 1)

    @property
    def whole_s(self) -> float:
        return self.done_s - self.sent_s


@dataclass(frozen=True, slots=True)
class Run:
    """All answers of one run, in the order of the requests; `cpu_s` is the client's own CPU time."""

    answers: tuple[Answer, ...]
    wall_s: float
    cpu_s: float


class LoadClient:
    """The light client's process. Use it in a `with`."""

    def __init__(
        self,
        url: str,
        *,
        path: str = COMPLETIONS,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """`timeout_s`: of each request; None: it waits for ever."""
        self._to = {"url": url, "path": path, "headers": dict(headers or {}), "timeout_s": timeout_s}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prad.http.load_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(
        self,
        bodies: Sequence[Mapping[str, Any]],
        *,
        at_s: Sequence[float | None] | None = None,
        at_once: int = 1 << 20,
    ) -> Run:
        """`at_s`: when each is sent; those without a time as soon as fewer than `at_once` of them run."""
        offsets = at_s or [None] * len(bodies)
        requests = [{"at_s": at, "body": body} for at, body in zip(offsets, bodies, strict=True)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**self._to, "requests": requests, "at_once": at_once}) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Run(tuple(map(Answer.of, told["answers"])), told["wall_s"], told["cpu_s"])


def latencies(run: Run) -> dict[str, Any]:
    """Time to first token, between tokens and to the end, in milliseconds, of the answers that are whole;
    requests and tokens per second."""
    whole = [answer for answer in run.answers if not answer.error]
    tokens = sum(answer.tokens for answer in whole)
    return {
        "ttft_ms": percentiles([answer.first_s for answer in whole]),
        "itl_ms": percentiles([between for answer in whole for between in answer.between_s]),
        "e2e_ms": percentiles([answer.whole_s for answer in whole]),
        "requests_per_s": round(len(whole) / run.wall_s, 2),
        "tokens_per_s": round(tokens / run.wall_s, 1),
        "client_cpu_share": round(run.cpu_s / run.wall_s, 3),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, in milliseconds."""
    p50, p90, p99 = (float(p) for p in numpy.percentile(values or [0.0], (50, 90, 99)))
    return {name: round(1e3 * p, 2) for name, p in (("p50", p50), ("p90", p90), ("p99", p99))}


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Offsets of independent arrivals, `rate` per second on average, without end."""
    chosen = random.Random(seed)
    at = 0.0
    while True:
        at += chosen.expovariate(rate)
        yield at
