"""What `prad adapter list` and `show` print: tasks, versions, and one version's whole record."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter_registry.api import TaskRoute, VersionRecord
from adapter_registry.versions import State

STYLES = {
    State.PUSHED: "yellow",
    State.VERIFIED: "cyan",
    State.FAILED: "red",
    State.ROUTABLE: "green",
    State.RETIRED: "dim",
    State.DELETED: "dim",
}


def show_tasks(tasks: Sequence[TaskRoute]) -> None:
    table = Table("task", "current", "versions", "method", "base model", box=None, header_style="bold")
    for task in tasks:
        newest = task.versions[-1]
        current = "-" if task.current is None else f"{task.task}@{task.current}"
        table.add_row(task.task, current, _states(task), _literal(newest.method), _literal(newest.base.name))
    _print_table(table)


def show_task(task: TaskRoute) -> None:
    table = Table(
        "version", "state", "method", "base model", "pushed", "digest", box=None, header_style="bold"
    )
    for version in task.versions:
        mark = " (current)" if version.version == task.current else ""
        state = f"[{STYLES[version.state]}]{version.state}[/]{mark}"
        name = f"{task.task}@{version.version}"
        pushed = version.pushed_at[:19].replace("T", " ")
        known = (_literal(version.method), _literal(version.base.name))
        table.add_row(name, state, *known, pushed, version.digest[:12])
    _print_table(table)
    Console().print(f"routing at revision {task.routing_revision}")


def show_version(record: VersionRecord) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "version": record.name + (" (current)" if record.current else ""),
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
    }
    for key, value in rows.items():
        table.add_row(key, _literal(value))
    for line in record.history:
        who = f" by {line.replica}" if line.replica else ""
        why = f": {line.reason}" if line.reason else ""
        table.add_row(
            f"revision {line.revision}", _literal(f"{line.at}  {line.event} → {line.after}{who}{why}")
        )
    _print_table(table)


def _literal(text: str) -> Text:
    """Text from outside, in which brackets are no markup."""
    return Text(text)


def _states(task: TaskRoute) -> str:
    return ", ".join(
        f"[{STYLES[version.state]}]@{version.version} {version.state}[/]" for version in task.versions
    )


def _print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no edge at which to cut digests and names
    console.print(table)
