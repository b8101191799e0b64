"""Writes the tables of docs/{performance,quality,training}.md from bench/results: no figure there is typed by
hand. What depends on the kind of CPU lies in a folder for each and has a table for each, side by side.

    python -m bench.report            # after any benchmark
    python -m bench.report --check    # only says whether the document is up to date

A table stands between two comments; the prose around it is the author's. The first names the result, the path
of a list in it (a dot steps into an object or picks from a list), and the columns with their headings:

    <!-- table decode by_batch | sequences | step_ms: step, ms | floor_ms: floor, ms -->
    <!-- end -->

Above each kind's table stands where and when it was measured; which of the kinds that have results have none
is said, and a column that no row of a kind has is left out there. Pictures of a result, one for each kind,
stand between `<!-- pictures decode: A step -->` and the end, what was asked of the server between
`<!-- gates -->` and the end: see bench.asked.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import gates
from bench.asked import GATES
from bench.kinds import KINDS, RESULTS
from bench.record import ROOT, machine

DOCUMENTS = tuple(ROOT / "docs" / f"{name}.md" for name in ("performance", "quality", "training"))
_NOTHING = "–"
_PICTURES = re.compile(r"(<!-- pictures (\S+): ([^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)
_GATES = re.compile(r"(<!-- gates -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table (\S+) (\S+) \|(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if not up to date.")] = False,
) -> None:
    """Write the tables of the documents anew from bench/results."""
    before = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    after = {path: render(text, RESULTS) for path, text in before.items()}
    changed = [path for path in DOCUMENTS if after[path] != before[path]]
    if check and changed:
        names = " and ".join(path.name for path in changed)
        sys.exit(f"not what bench/results says: {names}; run bench.report")
    for path in changed:
        path.write_text(after[path], encoding="utf-8")


def render(document: str, results: Path) -> str:
    """The document with every table written anew. ValueError for a path that a result does not have."""

    def fill(found: re.Match[str]) -> str:
        head, name, path, columns, end = found.groups()
        everywhere = results / f"{name}.json"  # of a benchmark that takes its time from no CPU
        files = [everywhere] if everywhere.is_file() else [kind / f"{name}.json" for kind in kinds]
        tables = {file: _table(file, path, columns) for file in files}
        parts = [table for table in tables.values() if table is not None]
        if missing := [f"`{file.parent.name}`" for file, table in tables.items() if table is None]:
            parts.append(f"Not measured on {', '.join(missing)}: `prad bench {name}`.\n")
        body = "\n".join(parts) or f"Not measured yet: `prad bench {name}`.\n"
        return f"{head}\n{body}\n{end}"

    def show(found: re.Match[str]) -> str:
        head, name, what, end = found.groups()
        there = [kind / f"{name}.png" for kind in kinds if (kind / f"{name}.png").is_file()]
        lines = [
            f"![{what}, {path.parent.name}](../bench/results/{path.parent.name}/{path.name})\n\n"
            for path in there
        ]
        return f"{head}\n{''.join(lines)}{end}"

    kinds = [results / kind for kind in KINDS if (results / kind).is_dir()]
    filled = _PICTURES.sub(show, _TABLE.sub(fill, document))
    return _GATES.sub(lambda found: f"{found[1]}\n{gates.table(GATES, kinds)}\n\n{found[2]}", filled)


def _table(file: Path, path: str, columns: str) -> str | None:
    """None if that was not measured, or is of before the benchmark had this part."""
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    keys, headings = [], []
    for column in columns.split("|"):
        key, _, heading = column.strip().partition(": ")
        keys.append(key)
        headings.append(heading or key)
    try:
        rows = _find(result, path.split("."), file.name)
    except ValueError:
        return None
    cells = [[_cell(_known(row, k.split("."))) for k in keys] for row in rows]
    known = [at for at in range(len(keys)) if any(row[at] != _NOTHING for row in cells)]
    lines = [headings, ["---"] * len(keys), *cells]
    table = "\n".join(f"| {' | '.join(line[at] for at in known)} |" for line in lines)
    return f"{_origin(file, result)}:\n\n{table}\n"


def _origin(file: Path, result: Any) -> str:
    """Which kind of CPU, commit and machine; of a result that is made of cells, which of theirs."""
    if "computed" in result:
        cells = "; ".join(f"at {', '.join(commits)}, {on}" for on, commits in result["computed"].items())
        return f"`{file.stem}` {cells}"
    setting = result["setting"]
    kind = f"**`{file.parent.name}`**, " if file.parent.name in KINDS else ""
    return f"{kind}`{file.stem}` at {setting['commit']}, {setting['when'][:10]}, {machine(setting)}"


def _known(row: Any, path: list[str]) -> Any:
    """None if the result is of before the benchmark had this column."""
    try:
        return _find(row, path, "row")
    except ValueError:
        return None


def _find(value: Any, path: list[str], where: str) -> Any:
    for part in path:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(f"{where} has no {'.'.join(path)}") from error
    return value


def _cell(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    typer.run(main)
