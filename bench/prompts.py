"""Random prompts: the same for the same seed; a larger count begins with the prompts of a smaller one."""

import random
from collections.abc import Iterator


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` ids. The lowest ids are left out: they are control tokens."""
    chosen = random.Random(seed)
    return [[chosen.randrange(100, vocabulary) for _ in range(length)] for _ in range(count)]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Offsets of independent arrivals, `rate` per second on average, within `seconds`."""
    chosen = random.Random(seed)
    at = chosen.expovariate(rate)
    while at < seconds:
        yield at
        at += chosen.expovariate(rate)
