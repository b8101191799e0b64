"""The life of an adapter version, as a table: no database, no HTTP.

                 probe_ok               promote …               retire
       pushed ────────────▶ verified ────────────▶ routable ────────────▶ retired
        │  ▲                 (task@N answers)       (was routed to)           ▲
        │  └── push ──┐                                                       │
        └──────────▶ failed ──────────────────────────────────────────────────┘
         probe_failed                      retire (from any state)

       retired ── unretire ──▶ pushed (and is probed again)
       pushed, failed, retired ── delete ──▶ deleted (its files go, its record stays)

A routing (promote, split, alias, rollback) names versions that answer; each becomes routable with it. Its
shadows have to answer as well, and stay what they are.

Probing again never takes a version away from traffic: once verified, another replica's `probe_failed` is
refused (that replica is at fault, not the version). A failed version is probed again when the same files
are pushed again.

A retired version comes back through a probe, as it may never have had one. A deleted one does not: the same
files, pushed again, are a new version.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from adapter_registry.errors import IllegalTransitionError


class State(StrEnum):
    """Where a version stands."""

    PUSHED = "pushed"
    VERIFIED = "verified"
    FAILED = "failed"
    ROUTABLE = "routable"
    RETIRED = "retired"
    DELETED = "deleted"

    @property
    def answers(self) -> bool:
        """Whether a new request for an explicit `task@N` may use it."""
        return self in (State.VERIFIED, State.ROUTABLE)

    @property
    def over(self) -> bool:
        """Whether the same files, pushed again, are a new version."""
        return self in (State.RETIRED, State.DELETED)

    @property
    def listed(self) -> bool:
        """Whether a list for people shows it without being asked for all."""
        return self not in (State.FAILED, State.DELETED)


class Event(StrEnum):
    """What moves a version on, or changes a task's routing, or both; or is wanted of all replicas."""

    PUSH = "push"
    PROBE_OK = "probe_ok"
    PROBE_FAILED = "probe_failed"
    PROMOTE = "promote"
    SPLIT = "split"
    ALIAS = "alias"
    SHADOW = "shadow"
    ROLLBACK = "rollback"
    WARM = "warm"
    RETIRE = "retire"
    UNRETIRE = "unretire"
    DELETE = "delete"

    @property
    def routes(self) -> bool:
        """Whether it routes requests to the versions that it names, which must answer."""
        return self in ROUTING_EVENTS


ROUTING_EVENTS = (Event.PROMOTE, Event.SPLIT, Event.ALIAS, Event.SHADOW, Event.ROLLBACK)
_ROUTED = dict.fromkeys(ROUTING_EVENTS, State.ROUTABLE)

TRANSITIONS: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.PUSHED: {
            Event.PUSH: State.PUSHED,
            Event.PROBE_OK: State.VERIFIED,
            Event.PROBE_FAILED: State.FAILED,
            Event.RETIRE: State.RETIRED,
            Event.DELETE: State.DELETED,
        },
        State.FAILED: {
            Event.PUSH: State.PUSHED,
            Event.PROBE_OK: State.VERIFIED,
            Event.PROBE_FAILED: State.FAILED,
            Event.RETIRE: State.RETIRED,
            Event.DELETE: State.DELETED,
        },
        State.VERIFIED: {
            Event.PUSH: State.VERIFIED,
            Event.PROBE_OK: State.VERIFIED,
            **_ROUTED,
            Event.SHADOW: State.VERIFIED,
            Event.WARM: State.VERIFIED,
            Event.RETIRE: State.RETIRED,
        },
        State.ROUTABLE: {
            Event.PUSH: State.ROUTABLE,
            Event.PROBE_OK: State.ROUTABLE,
            **_ROUTED,
            Event.WARM: State.ROUTABLE,
            Event.RETIRE: State.RETIRED,
        },
        State.RETIRED: {
            Event.RETIRE: State.RETIRED,
            Event.UNRETIRE: State.PUSHED,
            Event.DELETE: State.DELETED,
        },
        State.DELETED: {Event.DELETE: State.DELETED},
    }
)

_NOT_ROUTED = {
    State.PUSHED: "no prefill service has verified it yet: wait until one has probed it",
    State.FAILED: "its probe failed: push repaired files, or the same again for a new probe",
    State.RETIRED: "unretire it first: it is probed again, and can then be routed to",
    State.DELETED: "push its files again: that makes a new version",
}
_ADVICE = {
    (State.VERIFIED, Event.DELETE): "it answers requests: retire it first",
    (State.ROUTABLE, Event.DELETE): "it answers requests: retire it first",
    (State.DELETED, Event.UNRETIRE): "its files are gone: push them again, that makes a new version",
}


def after(name: str, state: State, event: Event) -> State:
    """The state of version `name` (`task@N`) after `event`. Raises IllegalTransitionError."""
    legal = TRANSITIONS[state]
    if event in legal:
        return legal[event]
    needs_answers = event.routes or event is Event.WARM
    advice = _NOT_ROUTED.get(state) if needs_answers else _ADVICE.get((state, event))
    advice = advice or f"legal now: {', '.join(sorted(legal))}"
    raise IllegalTransitionError(
        f"{name} is {state}, which does not allow {event} ({advice})", param="version"
    )
