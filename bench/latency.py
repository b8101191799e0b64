"""What all streams get together, out of the times at which their events arrived."""

from prad.http.load import Answer, Run


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
