"""What is known of a version before it is promoted, beside the one that answers now."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from adapter_registry.console.rendering import scalars
from adapter_registry.errors import FileNotStoredError, StoredFilesDamagedError
from adapter_registry.messages import VersionRecord
from adapter_registry.registry import Registry
from adapter_registry.traffic import Answered, LiveTraffic, Shadowed
from adapter_registry.versions import Event
from prad.artefact import CARD

HOUR = 3600
_CARD_CHARACTERS = 20_000
_LEFT_OUT = ("prad", "torch")
"""Of the training record: not what decides."""


@dataclass(frozen=True, slots=True)
class Side:
    """A version. `probe`: how and when it was tried; `card`: its README, as text."""

    record: VersionRecord
    answered: Answered
    training: dict[str, str]
    probe: str
    card: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """`now`: what plain `task` mostly means, None if that is the candidate itself, or nothing; `shadow`: how
    the candidate did in its shadow."""

    candidate: Side
    now: Side | None
    shadow: Shadowed | None
    changed: tuple[tuple[str, str, str], ...]

    @property
    def diff(self) -> str:
        """What compares both on prompts of one's own."""
        assert self.now is not None
        return f"prad adapter diff {self.now.record.name} {self.candidate.record.name} --data FILE"


async def gathered(
    registry: Registry, traffic: LiveTraffic, task: str, version: int, default: int | None
) -> Evidence:
    """`default`: the version that answers most requests now. Raises NotFoundError."""
    candidate = await _side(registry, traffic, task, version)
    now = None if default in (None, version) else await _side(registry, traffic, task, default)
    shadow = None if default is None else traffic.shadows(task, HOUR).get((default, version))
    return Evidence(candidate, now, shadow, () if now is None else _changed(now, candidate))


async def _side(registry: Registry, traffic: LiveTraffic, task: str, version: int) -> Side:
    record = await registry.version(task, version)
    answered = traffic.versions(task, HOUR).get(version, Answered())
    training = {k: v for k, v in scalars(record.record.training).items() if k not in _LEFT_OUT}
    return Side(record, answered, training, _probe(record), await _card(registry, record))


def _probe(record: VersionRecord) -> str:
    for line in reversed(record.history):
        if line.event is Event.PROBE_OK:
            return f"passed at {line.by or 'a replica'}"
        if line.event is Event.PROBE_FAILED:
            return f"failed at {line.by or 'a replica'}: {line.reason}"
    return "not yet"


async def _card(registry: Registry, record: VersionRecord) -> str:
    try:
        path = await registry.file(record.task, record.version, CARD)
        return await asyncio.to_thread(_beginning, path)
    except (FileNotStoredError, StoredFilesDamagedError, OSError):  # it may be deleted meanwhile
        return ""


def _beginning(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_CARD_CHARACTERS)


def _changed(now: Side, candidate: Side) -> tuple[tuple[str, str, str], ...]:
    """What the records say differently: the field, now, and of the candidate."""
    old, new = _facts(now), _facts(candidate)
    names = [*new, *(name for name in old if name not in new)]
    return tuple(
        (name, old.get(name, "–"), new.get(name, "–")) for name in names if old.get(name) != new.get(name)
    )


def _facts(side: Side) -> dict[str, str]:
    record = side.record.record
    generation = {name: v for name, v in record.generation.model_dump().items() if v not in (None, [], ())}
    return {
        "method": record.method,
        "base": f"{record.base.name} ({record.base.weights[:12]})",
        "template": record.template,
        "licence": record.licence or "–",
        "description": record.description or "–",
        **{f"default {name}": value for name, value in scalars(generation).items()},
        **{f"setting {name}": value for name, value in scalars(record.config).items()},
        **{f"training {name}": value for name, value in side.training.items()},
    }
