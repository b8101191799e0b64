"""What an event on one version does to its task: the state machine plus the question which one is current.

Pure: a store reads a `TaskView`, calls `plan`, and writes the `Change`s in one transaction.

- A version that becomes verified while its task has no current version is promoted at once: nothing else
  could answer. Otherwise promoting is the operator's decision.
- Retiring the current version is refused while another version could answer, because plain `task` would
  silently mean something else: promote the other first, or force it. Forced, the latest other routable
  version takes over. With none left the task has no current version, and says so to requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapter_registry.errors import CurrentVersionInUseError, RoutingChangedError, VersionNotFoundError
from adapter_registry.versions import Event, State, after


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as the policy sees it. `current` is what a plain `task` means.

    `revision`: of its routing, the last change that promoted or retired one of its versions.
    """

    task: str
    current: int | None
    states: Mapping[int, State]
    revision: int = 0

    def name(self, version: int) -> str:
        return f"{self.task}@{version}"


@dataclass(frozen=True, slots=True)
class Change:
    """One line of history, one revision. `current` is the task's current version afterwards."""

    version: int
    event: Event
    before: State
    after: State
    current: int | None


def plan(
    view: TaskView, version: int, event: Event, *, force: bool = False, expected: int | None = None
) -> tuple[Change, ...]:
    """The changes that `event` makes, in order; none if all is already so.

    `expected`: the revision of the routing that whoever asks has seen; None: whatever it is.
    Raises RoutingChangedError, VersionNotFoundError, IllegalTransitionError, CurrentVersionInUseError.
    """
    if expected is not None and expected != view.revision:
        raise RoutingChangedError(
            f"the routing of {view.task!r} is at revision {view.revision}, not {expected}: somebody changed "
            "it meanwhile; look at it again (prad adapter show), and repeat the request if still wanted",
            param="if-match",
        )
    if version not in view.states:
        raise VersionNotFoundError(f"{view.task} has no version {version}", param="version")
    before = view.states[version]
    reached = after(view.name(version), before, event)
    heir = _heir(view, version, force) if event is Event.RETIRE and view.current == version else None
    current = _current(view, version, event)
    if reached is before and current == view.current:
        return ()
    first = Change(version, event, before, reached, current)
    now = replace(view, current=current, states={**view.states, version: reached})
    if heir is not None:
        return (first, *plan(now, heir, Event.PROMOTE))
    if event is Event.PROBE_OK and now.current is None:
        return (first, *plan(now, version, Event.PROMOTE))
    return (first,)


def _current(view: TaskView, version: int, event: Event) -> int | None:
    if event is Event.PROMOTE:
        return version
    if event is Event.RETIRE and view.current == version:
        return None
    return view.current


def _heir(view: TaskView, retiring: int, force: bool) -> int | None:
    """Who takes over from the current version. Raises CurrentVersionInUseError without `force`."""
    others = [n for n, state in view.states.items() if state.answers and n != retiring]
    if not others:
        return None
    routable = [n for n in others if view.states[n] is State.ROUTABLE]
    if force:
        return max(routable, default=None)
    outcome = f"{view.name(max(routable))} takes over" if routable else "the task stops answering"
    raise CurrentVersionInUseError(
        f"{view.name(retiring)} is what plain {view.task!r} means; promote another first"
        f" ({', '.join(view.name(n) for n in sorted(others))}), or force it: then {outcome}",
        param="version",
    )
