"""What `prad adapter list`, `show`, `events`, `status` and `diff`, and `prad keys`, print."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter_registry.keys import KeyRecord, Role
from adapter_registry.messages import (
    HistoryLine,
    ReplicaList,
    ReplicaState,
    TaskRoute,
    VersionRecord,
    Warmed,
)
from adapter_registry.names import PREVIOUS
from adapter_registry.routing import Routing
from adapter_registry.versions import State

STYLES = {
    State.PUSHED: "yellow",
    State.VERIFIED: "cyan",
    State.FAILED: "red",
    State.ROUTABLE: "green",
    State.RETIRED: "dim",
    State.DELETED: "dim",
}
REPLICA_STYLES = {
    ReplicaState.ANNOUNCED: "yellow",
    ReplicaState.LOADING: "yellow",
    ReplicaState.READY: "green",
    ReplicaState.FAILED: "red",
    ReplicaState.AWAY: "dim",
}


def described(task: TaskRoute) -> str:
    """A routing in a line or two: what each name of the task means, by which revision."""
    routing, name = task.routing, task.task
    if not routing.split:
        plain = f"{name!r} has no version now: requests for it are refused"
    elif len(routing.split) == 1:
        plain = f"plain {name!r} means {name}@{routing.default}"
    else:
        total = sum(routing.split.values())
        parts = (f"{100 * weight / total:.3g}% {name}@{n}" for n, weight in routing.split.items())
        plain = f"plain {name!r} means {', '.join(parts)}"
    meant = dict(routing.aliases)
    if routing.previous is not None:
        meant[PREVIOUS] = routing.previous
    aliases = "".join(f"\n{name}@{alias} is {name}@{number}" for alias, number in meant.items())
    shadow = "".join(
        f"\n{share:g}% of them also run under {name}@{n}, unseen" for n, share in routing.shadow.items()
    )
    return f"{plain}{shadow}{aliases}\nrouting at revision {routing.revision}"


def show_tasks(tasks: Sequence[TaskRoute]) -> None:
    table = Table("task", "requests get", "versions", "method", "base model", box=None, header_style="bold")
    for task in tasks:
        newest = task.versions[-1]
        shares = _shares(task.task, task.routing)
        table.add_row(task.task, shares, _states(task), _literal(newest.method), _literal(newest.base.name))
    _print_table(table)


def show_task(task: TaskRoute) -> None:
    table = Table(
        "version",
        "state",
        "requests",
        "method",
        "base model",
        "pushed",
        "digest",
        box=None,
        header_style="bold",
    )
    for version in task.versions:
        state = f"[{STYLES[version.state]}]{version.state}[/]"
        name = f"{task.task}@{version.version}"
        pushed = _when(version.pushed_at)
        known = (_literal(version.method), _literal(version.base.name))
        named = ", ".join(task.routing.names(task.task, version.version))
        table.add_row(name, state, named, *known, pushed, version.digest[:12])
    _print_table(table)
    Console().print(described(task), markup=False, highlight=False)


def show_events(events: Iterable[tuple[str, HistoryLine]]) -> None:
    """Each with its task."""
    table = Table("when", "who", "what", "then", "revision", box=None, header_style="bold")
    for task, line in events:
        version = task if line.version is None else f"{task}@{line.version}"
        moved = "" if line.after is None or line.before is line.after else f": {line.after}"
        why = f" ({line.reason})" if line.reason else ""
        made = "" if line.routing is None else _made(task, line.routing)
        when = _when(line.at)
        what = f"{line.event} {version}{moved}{why}"
        table.add_row(when, _literal(line.by or "-"), _literal(what), made, str(line.revision))
    _print_table(table)


def show_replicas(revision: int, found: ReplicaList) -> None:
    print(f"the registry is at revision {revision}")
    if not found.replicas:
        print("no prefill service follows it (start one: prad serve, or prad prefill)")
        return
    table = Table("replica", "state", "revision", "last seen", "trouble", box=None, header_style="bold")
    for replica in found.replicas:
        known = "-" if replica.revision is None else str(replica.revision)
        left = f" ({replica.fetching:,} adapters to fetch)" if replica.fetching else ""
        state = f"[{REPLICA_STYLES[replica.state]}]{replica.state}[/]{left}"
        seen = _when(replica.last_seen)
        table.add_row(_literal(replica.name), state, known, seen, _literal("; ".join(replica.troubles)))
    _print_table(table)


def show_warmed(found: Sequence[Warmed]) -> None:
    for each in found:
        name = f"{each.task}@{each.version}"
        if each.ready:
            print(f"{name} is in memory at {', '.join(each.ready)}")
        for replica, why in each.failed.items():
            print(f"{name} is not in memory at {replica}: {why}")
        if each.pending:
            print(f"{name} is not known to be in memory yet at {', '.join(each.pending)}")
        if not (each.ready or each.failed or each.pending):
            print("no prefill service follows the registry (start one: prad serve, or prad prefill)")


def show_comparison(
    names: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    changed: Sequence[tuple[str, str, str, str]],
    all_changed: int,
) -> None:
    """`changed`: prompt, both answers and the right one, of some of `all_changed` prompts."""
    if any(scores):
        table = Table("score", *names, box=None, header_style="bold")
        for metric in scores[0]:
            table.add_row(metric, *(f"{of.get(metric, float('nan')):g}" for of in scores))
        _print_table(table)
    if changed:
        print(f"{len(changed)} of {all_changed} prompts that changed:")
        right = any(row[3] for row in changed)
        table = Table("prompt", *names, *(["right"] if right else []), box=None, header_style="bold")
        for row in changed:
            table.add_row(*map(_literal, row if right else row[:3]))
        _print_table(table)


def described_key(key: KeyRecord) -> str:
    """A key in a line: whose, and what it may."""
    tasks = "" if key.tasks is None else f"for {', '.join(key.tasks)}"
    return f"{key.name!r}: {', '.join(filter(None, (f'role {key.role}', tasks, _limits(key))))}"


def show_keys(keys: Sequence[KeyRecord]) -> None:
    table = Table("key", "role", "tasks", "limits", "made", "by", "revoked", box=None, header_style="bold")
    for key in keys:
        tasks = ", ".join(key.tasks) if key.tasks is not None else "all" if key.role is Role.COMPLETE else "-"
        revoked = "" if key.revoked_at is None else f"{_when(key.revoked_at)} by {key.revoked_by or '-'}"
        cells = (key.name, key.role, tasks, _limits(key) or "-", _when(key.created_at), key.created_by or "-")
        style = None if key.revoked_at is None else "dim"
        table.add_row(*map(_literal, (*cells, revoked)), style=style)
    _print_table(table)


def _limits(key: KeyRecord) -> str:
    limits = key.limits
    said = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrent, "at once"),
    )
    return ", ".join(f"{most} {what}" for most, what in said if most is not None)


def _when(at: str) -> str:
    return at[:19].replace("T", " ")


def show_version(record: VersionRecord) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "version": record.name + (" (plain requests get it)" if record.current else ""),
        "state": f"{record.state}: {record.reason}" if record.reason else str(record.state),
        "digest": record.digest,
        "method": record.record.method,
        "base model": f"{record.record.base.name} ({record.record.base.architecture})",
        "template": record.record.template,
        "tensors": f"{record.tensors}, {record.tensor_bytes / 1e6:.2f} MB",
        "files": ", ".join(f"{file.name} ({file.size} B)" for file in record.files),
        "licence": record.record.licence or "-",
        "description": record.record.description or "-",
        "pushed": record.pushed_at,
        "fetched from": record.source or "-: it was uploaded",
        "signed by": ", ".join(each.who for each in record.signatures) or "nobody",
    }
    for key, value in rows.items():
        table.add_row(key, _literal(value))
    for line in record.history:
        who = f" by {line.by}" if line.by else ""
        why = f": {line.reason}" if line.reason else ""
        table.add_row(
            f"revision {line.revision}", _literal(f"{line.at}  {line.event} → {line.after}{who}{why}")
        )
    _print_table(table)


def _literal(text: str) -> Text:
    """Text from outside, in which brackets are no markup."""
    return Text(text)


def _shares(task: str, routing: Routing) -> str:
    if len(routing.split) == 1:
        return f"{task}@{routing.default}"
    return " ".join(f"@{number}={weight}" for number, weight in routing.split.items()) or "-"


def _made(task: str, routing: Routing) -> str:
    aliases = (f"{name}=@{number}" for name, number in routing.aliases.items())
    shadow = (f"shadow @{number}={share:g}%" for number, share in routing.shadow.items())
    return " ".join((_shares(task, routing), *aliases, *shadow))


def _states(task: TaskRoute) -> str:
    return ", ".join(
        f"[{STYLES[version.state]}]@{version.version} {version.state}[/]" for version in task.versions
    )


def _print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no edge at which to cut digests and names
    console.print(table)
