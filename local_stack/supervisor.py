"""Children that end are started again, each by itself, while the others go on serving."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from local_stack.stack import Service, Stack, StackError

MOST_ENDS = 5
"""So many ends of a child without having been ready in between, and the stack gives up."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 30.0
_POLL_S = 0.2


@dataclass(slots=True)
class Restarts:
    """When a child that ended may start again: policy alone, times in seconds of any clock.

    `most`: ends without having been ready in between after which it is given up; None: never. `ends`: since
    it was ready last. Between two ends the delay doubles, up to half a minute.
    """

    most: int | None = MOST_ENDS
    ends: int = 0
    _start_at: float | None = field(default=None, init=False)

    @property
    def settled(self) -> bool:
        """Whether it is known to have been ready since it started last."""
        return self.ends == 0

    @property
    def waiting(self) -> bool:
        """Whether it has ended, and its next start is still to come."""
        return self._start_at is not None

    def ended(self, now: float) -> float | None:
        """Notes an end. The delay before the next start, or None: it is not to be started again."""
        self.ends += 1
        if self.ends == self.most:
            return None
        doubled = min(self.ends - 1, 10)  # whoever ends for ever
        delay = min(_FIRST_DELAY_S * 2.0**doubled, _LONGEST_DELAY_S)
        self._start_at = now + delay
        return delay

    def may_restart(self, now: float) -> bool:
        return self._start_at is not None and now >= self._start_at

    def started(self) -> None:
        self._start_at = None

    def ready(self) -> None:
        self.ends = 0


class Supervisor:
    """Watches a stack that was ready once.

    `ready`: by a child's name, whether it serves; asked after it was started again. `say` tells a person.
    `missed_by_none`: without which the others go on; such a one is never given up.
    """

    def __init__(
        self,
        stack: Stack,
        ready: Mapping[str, Callable[[], bool]],
        say: Callable[[str], None],
        missed_by_none: Collection[str] = (),
    ) -> None:
        self._stack = stack
        self._ready = ready
        self._say = say
        self._restarts = {name: Restarts(None if name in missed_by_none else MOST_ENDS) for name in ready}

    def run(self) -> NoReturn:
        """Goes on until interrupted. Raises StackError when a child keeps ending that the others need."""
        while True:
            for service in self._stack.services:
                self._look_after(service, self._restarts[service.name])
            self._stack.bound_logs()
            time.sleep(_POLL_S)

    def _look_after(self, service: Service, restarts: Restarts) -> None:
        if restarts.may_restart(time.monotonic()):
            self._stack.restart(service.name)
            restarts.started()
        elif restarts.waiting:
            return
        elif service.ended:
            delay = restarts.ended(time.monotonic())
            if delay is None:
                raise StackError(
                    f"{service.name} ended {MOST_ENDS} times without having been ready in between. "
                    f"The last time:\n{service.describe_end()}"
                )
            self._say(service.describe_end(f"; starting again in {delay:g} s"))
        elif not restarts.settled and self._ready[service.name]():
            restarts.ready()
            self._say(f"{service.name} is ready again")
