"""`prad adapter promote|split|alias|shadow|rollback|retire`: what a task's names mean; `events`, `status`:
who changed it, and where it is in force; `warm`: bring a version into memory there."""

import re
import time
from typing import Annotated

import typer

from adapter_registry.client import RegistryClient
from adapter_registry.messages import AuditLog, ReplicaList, Rerouted, TaskHistory
from adapter_registry.names import parse_name
from adapter_registry.routing import WHOLE
from prad_cli.operating import (
    DEFAULT_REGISTRY,
    Json,
    Registry,
    Seen,
    Task,
    Version,
    fail,
    print_json,
    say_pending,
    talking,
    version_of,
)
from prad_cli.tables import described, show_events, show_replicas, show_warmed

_PAUSE_S = 0.2
"""Between two questions to a registry that waits hardly at all."""

_SHARE = re.compile(r"([1-9][0-9]*)=([1-9][0-9]*)")
_PERCENT = re.compile(r"([1-9][0-9]*)=([0-9]{1,3}(?:\.[0-9]{1,6})?)%?")
_SET = re.compile(r"([^=]+)=([1-9][0-9]*)")


def promote(
    name: Version, seen: Seen = None, as_json: Json = False, registry: Registry = DEFAULT_REGISTRY
) -> None:
    """Make a verified version what plain TASK means. The earlier one still answers to its TASK@N."""
    with talking(registry) as client:
        task, version = version_of(client, name)
        rerouted = client.promote(task, version, seen=seen)
    _say(rerouted, as_json, f"{task}@{version} is now what plain {task!r} means")


def split(
    task: Task,
    shares: Annotated[
        list[str], typer.Argument(metavar="N=WEIGHT...", help="Versions and their weights, e.g. 1=90 2=10.")
    ],
    seen: Seen = None,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Divide requests for plain TASK between versions. The same `user` keeps its version; a larger weight
    takes users over and gives none away."""
    weights: dict[int, int] = {}
    for share in shares:
        found = _SHARE.fullmatch(share)
        if found is None or int(found[1]) in weights:
            raise typer.BadParameter(
                f"{share!r}: expected each version once, with a whole number as its weight, as in 1=90 2=10; "
                "one that is to get nothing is left out",
                param_hint="N=WEIGHT",
            )
        weights[int(found[1])] = int(found[2])
    with talking(registry) as client:
        rerouted = client.split(task, weights, seen=seen)
    _say(rerouted, as_json)


def alias(
    task: Task,
    setting: Annotated[
        str | None, typer.Argument(metavar="[ALIAS=N]", help="What it means, e.g. canary=2.")
    ] = None,
    remove: Annotated[str | None, typer.Option(help="Let this alias mean nothing any more.")] = None,
    seen: Seen = None,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Let TASK@ALIAS mean a version. TASK@previous follows by itself."""
    found = _SET.fullmatch(setting or "")
    if (found is None) == (remove is None) or (setting is not None and found is None):
        raise typer.BadParameter("expected an alias and a version, as in canary=2, or --remove canary")
    with talking(registry) as client:
        name, version = (found[1], int(found[2])) if found else (remove or "", None)
        rerouted = client.alias(task, name, version, seen=seen)
    means = "means nothing any more" if version is None else f"is {task}@{version} now"
    _say(rerouted, as_json, f"{task}@{name} {means}")


def shadow(
    task: Task,
    shares: Annotated[
        list[str] | None,
        typer.Argument(metavar="[N=PERCENT...]", help="Versions and their share of the requests, e.g. 2=5%."),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Under no other version any more.")] = False,
    seen: Seen = None,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Let a share of the requests for plain TASK also run under another version, unseen by whoever asks.

    Greedy, after the answer that they get, and only while nothing else waits; /metrics of the prefill service
    (prad_shadow_...) say how far both agree and how long both take.
    """
    wanted: dict[int, float] = {}
    for share in shares or ():
        found = _PERCENT.fullmatch(share)
        if found is None or int(found[1]) in wanted or not 0 < float(found[2]) <= WHOLE:
            raise typer.BadParameter(
                f"{share!r}: expected each version once, with its percent of the requests, as in 2=5%",
                param_hint="N=PERCENT",
            )
        wanted[int(found[1])] = float(found[2])
    if off is bool(wanted) or sum(wanted.values()) > WHOLE:
        raise typer.BadParameter("expected shares of up to 100% together, as in 2=5%, or --off")
    with talking(registry) as client:
        rerouted = client.shadow(task, wanted, seen=seen)
    _say(rerouted, as_json)


def rollback(
    task: Task, seen: Seen = None, as_json: Json = False, registry: Registry = DEFAULT_REGISTRY
) -> None:
    """Bring the routing before back: split, aliases and shadows. Once more goes one further back."""
    with talking(registry) as client:
        rerouted = client.rollback(task, seen=seen)
    _say(rerouted, as_json, "the routing before is in force again")


def retire(
    name: Version,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also one that plain TASK or an alias means: the others in the split take over, or the "
            "latest routable, and the alias is gone.",
        ),
    ] = False,
    seen: Seen = None,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """No new requests for a version; running ones keep it. One that is routed to needs another or --force;
    a task's only version does not, and then the task answers nobody."""
    with talking(registry) as client:
        task, version = version_of(client, name)
        rerouted = client.retire(task, version, force=force, seen=seen)
    _say(rerouted, as_json, f"{task}@{version} is retired; running requests keep it")


def events(
    task: Annotated[str, typer.Argument(metavar="[TASK]", help="The task; all if none is named.")] = "",
    latest: Annotated[int, typer.Option(help="So many of the latest.", min=1, max=10_000)] = 20,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """What happened to a task, or to all: when, who, what."""
    found: TaskHistory | AuditLog
    with talking(registry) as client:
        found = client.history(task, latest) if task else client.log(latest)
    if as_json:
        print_json(found.model_dump(mode="json"))
    elif isinstance(found, TaskHistory):
        show_events((task, line) for line in found.events)
    else:
        show_events((line.task, line) for line in found.events)


def status(
    wait: Annotated[
        float,
        typer.Option(help="Seconds to wait until all are ready; exit code 1 if not all are then.", min=0),
    ] = 0.0,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """The prefill services that follow the registry: announced, loading, ready, or failed and why."""
    with talking(registry) as client:
        revision = client.state().revision
        found = _waited(client, revision, wait)
    if as_json:
        print_json({"revision": revision, **found.model_dump(mode="json")})
    else:
        show_replicas(revision, found)
    if wait and found.pending:
        fail(f"not ready after {wait:g} s: {', '.join(found.pending)}")


def warm(
    name: Annotated[
        str, typer.Argument(metavar="TASK[@N|@ALIAS]", help="A task: all that it means; or one version.")
    ],
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Have all prefill services load a version into memory now, so that no request has to wait for that.

    Exit code 1 if it is not in memory everywhere. Versions that are used later may push it out again.
    """
    with talking(registry) as client:
        task, which = parse_name(name)
        versions = client.task(task).routing.split if which is None else [version_of(client, name)[1]]
        if not versions:
            fail(f"{task!r} has no version now; name one, as in {task}@1")
        found = [client.warm(task, version) for version in versions]
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
    else:
        show_warmed(found)
    cold = [f"{each.task}@{each.version}" for each in found if not each.ready or each.failed or each.pending]
    if cold:
        fail(f"{', '.join(cold)}: not in memory everywhere")


COMMANDS = (
    (promote, "prad adapter promote support@2"),
    (split, "prad adapter split support 1=90 2=10"),
    (alias, "prad adapter alias support canary=2"),
    (shadow, "prad adapter shadow support 2=5%"),
    (rollback, "prad adapter rollback support"),
    (retire, "prad adapter retire support@1"),
    (events, "prad adapter events support"),
    (status, "prad adapter status"),
    (warm, "prad adapter warm support@2"),
)
"""Each with how it is typed."""


def _waited(client: RegistryClient, revision: int, seconds: float) -> ReplicaList:
    """The replicas, once `revision` is in force at all, or `seconds` later: one question waits less."""
    end = time.monotonic() + seconds
    found = client.replicas(revision, seconds)
    while found.pending and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _PAUSE_S))
        found = client.replicas(revision, max(0.0, end - time.monotonic()))
    return found


def _say(rerouted: Rerouted, as_json: bool, done: str = "") -> None:
    if as_json:
        print_json(rerouted.model_dump(mode="json"))
        return
    if done:
        print(done)
    print(described(rerouted))
    say_pending(rerouted)
