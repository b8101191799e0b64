"""How far an evaluation is: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

BETWEEN_LINES_S = 10.0


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, of which there are `total`; how many have come is said on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, total=total, description=what, console=console, transient=True)
        return
    said_at = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - said_at >= BETWEEN_LINES_S:
            console.print(f"{what}: {number} of {total}", highlight=False)
            said_at = time.monotonic()
