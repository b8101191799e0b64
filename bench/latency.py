"""What streaming clients felt, out of the times at which their events arrived."""

from itertools import pairwise
from typing import Any

import numpy

from bench.serving import Answer, Run


def latencies(run: Run) -> dict[str, Any]:
    """Time to first token and between tokens, in milliseconds; requests and tokens per second."""
    first = [answer.events_s[0] - answer.sent_s for answer in run.answers]
    between = [later - earlier for answer in run.answers for earlier, later in pairwise(answer.events_s)]
    tokens = sum(answer.tokens for answer in run.answers)
    return {
        "ttft_ms": _percentiles(first),
        "itl_ms": _percentiles(between),
        "requests_per_s": round(len(run.answers) / run.wall_s, 2),
        "tokens_per_s": round(tokens / run.wall_s, 1),
        "client_cpu_share": round(run.cpu_s / run.wall_s, 3),
    }


def steady_tokens_per_s(run: Run, cores: int) -> float:
    """Tokens per second while all streams ran: from the last one's first event to the first one's end.

    The client's share of the machine is taken off the time: on its own machine it would cost us nothing.
    """
    start = max(answer.events_s[0] for answer in run.answers)
    end = min(_last(answer) for answer in run.answers)
    tokens = sum(_between(answer, start, end) for answer in run.answers)
    others = 1 - run.cpu_s / run.wall_s / cores
    return tokens / ((end - start) * others)


def _last(answer: Answer) -> float:
    return answer.events_s[-1]


def _between(answer: Answer, start: float, end: float) -> float:
    """Tokens that arrived after `start` until `end`: an event may hold more than one, if a character was
    incomplete, so events count as much as they do on average."""
    return sum(start < at <= end for at in answer.events_s) * answer.tokens / len(answer.events_s)


def _percentiles(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in numpy.percentile(values or [0.0], (50, 90, 99)))
    return {name: round(1e3 * p, 2) for name, p in (("p50", p50), ("p90", p90), ("p99", p99))}
