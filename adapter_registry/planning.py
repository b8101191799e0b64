"""What is wanted of a task, as the changes that it makes: the state machine, and how it moves the routing.

Pure: a store reads a `TaskView`, calls `plan`, and writes the `Change`s in one transaction.

- A version that becomes verified while its task routes to none is promoted at once: nothing else could
  answer. Otherwise what is routed is the operator's decision.
- Retiring a version that plain `task` or an alias means is refused: the name would silently mean something
  else. Change the routing first, or force it. Forced, the split goes on with the others in it, else the
  latest other routable version takes over, and its aliases are gone. With none left the task does not
  answer, and says so to requests.
- A rollback brings the whole routing before back: split, aliases and shadows.
- A shadow ends with its version: it answers nobody, so nobody has to be asked. It also ends where its
  version comes to answer everything, and would be its own shadow.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from adapter_registry.errors import (
    InvalidRequestError,
    NoRoutingBeforeError,
    RoutingChangedError,
    VersionNotFoundError,
    VersionRoutedError,
)
from adapter_registry.names import check_alias
from adapter_registry.routing import Routing
from adapter_registry.versions import Event, State, after

MAX_ALIASES = 64
_TOLD = 8


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as the policy sees it."""

    task: str
    routing: Routing
    states: Mapping[int, State]

    def name(self, version: int) -> str:
        return f"{self.task}@{version}"

    def state(self, version: int) -> State:
        """Raises VersionNotFoundError."""
        if version not in self.states:
            raise VersionNotFoundError(
                f"{self.task} has no version {version}{numbered(self.states)}", param="version"
            )
        return self.states[version]


def numbered(known: Iterable[int]) -> str:
    """Behind what says that a task has no such version: those that it has, of many the latest."""
    there = sorted(known)
    before = "..., " if len(there) > _TOLD else ""
    return f": it has {before}{', '.join(map(str, there[-_TOLD:]))}" if there else ""


@dataclass(frozen=True, slots=True)
class Change:
    """One line of history, one revision. `version`: whose state goes from `before` to `after`; None: of none.

    `routing`: the task's from now on, of which the store knows the revision; None: it stays what it was.
    """

    version: int | None
    event: Event
    before: State | None
    after: State | None
    routing: Routing | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """One event on one version; to promote it is one. `force`: retire it also if it is routed to."""

    version: int
    event: Event
    force: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Plain `task` means these versions, by weight."""

    weights: Mapping[int, int]
    event = Event.SPLIT


@dataclass(frozen=True, slots=True)
class SetAlias:
    """`task@alias` means the version; None: nothing any more."""

    alias: str
    version: int | None
    event = Event.ALIAS


@dataclass(frozen=True, slots=True)
class SetShadow:
    """Requests for plain `task` also run under these versions, each with its percent of them; empty: none."""

    shares: Mapping[int, float]
    event = Event.SHADOW


@dataclass(frozen=True, slots=True)
class Rollback:
    """The routing before is in force again."""

    event = Event.ROLLBACK


Wanted = Move | Split | SetAlias | SetShadow | Rollback
Past = Callable[[int], Routing | None]
"""The routing that the task's change of a revision made; None: that made none."""


def plan(view: TaskView, wanted: Wanted, past: Past, *, expected: int | None = None) -> tuple[Change, ...]:
    """The changes, in order; none if all is already so.

    `expected`: the revision of the routing that whoever asks has seen; None: whatever it is.
    Raises RoutingChangedError, VersionNotFoundError, IllegalTransitionError, VersionRoutedError,
    NoRoutingBeforeError, InvalidRequestError.
    """
    if expected is not None and expected != view.routing.revision:
        raise RoutingChangedError(
            f"the routing of {view.task!r} is at revision {view.routing.revision}, not {expected}: somebody "
            "changed it meanwhile; look at it again (prad adapter show), and repeat the request if still "
            "wanted",
            param="if-match",
        )
    match wanted:
        case Move(version, Event.PROMOTE):
            return _routed(view, Event.PROMOTE, view.routing.divided({version: 1}), version)
        case Move():
            return _moved(view, wanted)
        case Split(weights):
            return _routed(view, Event.SPLIT, view.routing.divided(weights), None)
        case SetAlias(alias, version):
            return _routed(view, Event.ALIAS, _aliased(view, alias, version), version)
        case SetShadow(shares):
            for number in sorted(shares):
                after(view.name(number), view.state(number), Event.SHADOW)
                if set(view.routing.split) == {number}:
                    raise InvalidRequestError(
                        f"{view.name(number)} answers every request for {view.task!r} itself: a shadow is "
                        "another version, which is compared with it",
                        param="shadow",
                    )
            return _routed(view, Event.SHADOW, view.routing.shadowed(shares), None)
        case Rollback():
            return _routed(view, Event.ROLLBACK, _before(view, past), None)


def _routed(view: TaskView, event: Event, routing: Routing, version: int | None) -> tuple[Change, ...]:
    """What is named becomes routable, and the routing another. `version`: whose line tells of both."""
    before = {number: view.state(number) for number in sorted(routing.named)}
    reached = {number: after(view.name(number), state, event) for number, state in before.items()}
    if routing.same(view.routing):
        return ()
    moved = tuple(
        Change(number, event, before[number], reached[number])
        for number in before
        if before[number] is not reached[number] and number != version
    )
    if version is None:
        return (*moved, Change(None, event, None, None, routing))
    return (*moved, Change(version, event, before[version], reached[version], routing))


def _aliased(view: TaskView, alias: str, version: int | None) -> Routing:
    """Raises InvalidRequestError."""
    routing = view.routing.aliased(check_alias(alias), version)
    if len(routing.aliases) > MAX_ALIASES:
        raise InvalidRequestError(
            f"{view.task!r} has {len(view.routing.aliases)} aliases, as many as a task may have; remove one",
            param="alias",
        )
    return routing


def _moved(view: TaskView, wanted: Move) -> tuple[Change, ...]:
    before = view.state(wanted.version)
    reached = after(view.name(wanted.version), before, wanted.event)
    retiring = wanted.event is Event.RETIRE
    if retiring and not wanted.force:
        _require_unrouted(view, wanted.version)
    if reached is before and wanted.event is not Event.WARM:  # which is wanted anew each time
        return ()
    routing = view.routing.without(wanted.version) if retiring else None
    change = Change(wanted.version, wanted.event, before, reached, routing)
    now = replace(view, routing=routing or view.routing, states={**view.states, wanted.version: reached})
    heir = _heir(now, wanted, was_routed=bool(view.routing.split))
    if heir is None:
        return (change,)
    taken = now.routing.inherited(heir) if retiring else now.routing.divided({heir: 1})
    return (change, *_routed(now, Event.PROMOTE, taken, heir))


def _heir(view: TaskView, wanted: Move, *, was_routed: bool) -> int | None:
    """Who is promoted along with it, as the task has no version left, or had none yet."""
    if view.routing.split:
        return None
    if wanted.event is Event.PROBE_OK:
        return wanted.version
    if wanted.event is Event.RETIRE and was_routed:
        return _latest_routable(view, wanted.version)
    return None


def _latest_routable(view: TaskView, but: int) -> int | None:
    others = (n for n, state in view.states.items() if state is State.ROUTABLE and n != but)
    return max(others, default=None)


def _require_unrouted(view: TaskView, version: int) -> None:
    """Raises VersionRoutedError. A task's only version, without an alias, may end."""
    routing = view.routing
    if version not in routing.named:
        return
    others = sorted(n for n, state in view.states.items() if state.answers and n != version)
    aliased = version in routing.aliases.values()
    if not others and not aliased:
        return
    advice, outcome = [], []
    if version in routing.split:
        named = ", ".join(view.name(number) for number in others)
        advice.append(f"promote another first ({named})" if others else "push another first")
        left = [view.name(number) for number in routing.split if number != version]
        latest = _latest_routable(view, version)
        if left:
            outcome.append(
                f"{', '.join(left)} takes over" if len(left) == 1 else f"{', '.join(left)} take over"
            )
        else:
            outcome.append(
                "the task stops answering" if latest is None else f"{view.name(latest)} takes over"
            )
    if aliased:
        advice.append("move its alias, or remove it")
        outcome.append("its alias is gone")
    raise VersionRoutedError(
        f"{view.name(version)} is what {' and '.join(routing.names(view.task, version))} means; "
        f"{' and '.join(advice)}, or force it: then {', and '.join(outcome)}",
        param="version",
    )


def _before(view: TaskView, past: Past) -> Routing:
    """The latest one before that routes otherwise: a forced retire may have led back to the one before.

    Raises NoRoutingBeforeError.
    """
    answering = frozenset(n for n, state in view.states.items() if state.answers)
    before = view.routing.before
    found = None if before is None else past(before)
    while found is not None and found.restored(answering).same(view.routing):
        before = found.before
        found = None if before is None else past(before)
    if found is None:
        raise NoRoutingBeforeError(
            f"{view.task!r} has no routing before the present one, so there is nothing to go back to; "
            "promote a version, or split"
        )
    gone = [n for n in sorted(found.named) if not view.state(n).answers]
    if gone:
        raise NoRoutingBeforeError(
            f"the routing before, of revision {before}, names "
            f"{', '.join(f'{view.name(n)}, which is {view.state(n)}' for n in gone)}: unretire it first "
            "(prad adapter unretire), or promote another version, or split"
        )
    return found.restored(answering)
