"""Does an adapter on the prompt alone do as well as on all positions? The paper's claim, measured here.

Rows are methods, columns tasks; each cell is trained and tested on the same reduced number of examples. A
finished cell is kept and never computed again: kill this and start it again at will. Several at once share
the cells: of one computing thread each, they are faster than one of many.

    prad bench quality --data DIR              # DIR/<task>/{train,validation,test}.jsonl
    prad bench quality --data DIR --cells 3    # only so many more cells, then the tables
    prad bench quality --data DIR --threads 1  # once for each core
"""

import contextlib
import statistics
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from bench.flags_of_training import Quality
from bench.model import load, model_folder
from bench.quality_bootstrap import counts, mean_score, paired_difference
from bench.quality_cells import Study
from bench.quality_table import COLUMNS, ROWS, Column, Row
from bench.record import machine
from prad.adapters import METHODS
from prad.lm import Tokenizer, served_name


def run(arguments: Quality) -> dict[str, Any]:
    console = Console(stderr=True)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = model_folder(arguments)
    model, tokenizer = load(arguments, arguments.device), Tokenizer(folder)
    cells = arguments.out / "quality"
    study = Study(
        model,
        tokenizer,
        model.stop_ids(folder) | tokenizer.end_ids,
        served_name(arguments.model),
        arguments.data,
        cells,
        cells / "running",
        arguments.beams,
    )
    study.work.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row.name in arguments.methods and _is_known(row, console)]
    columns = [_sized(c, arguments.size) for c in COLUMNS if c.task in arguments.tasks]
    wanted = [(row, column, seed) for column in columns for row in rows for seed in _seeds(row, column)]
    wanted.sort(key=lambda cell: cell[2])  # first one seed of all
    computed = 0
    for number, (row, column, seed) in enumerate(wanted, start=1):
        if computed == arguments.cells:
            break
        lock = FileLock(study.work / f"{study.path(row, column, seed).stem}.lock", timeout=0)
        with contextlib.suppress(Timeout), lock:  # or another process is at it
            if study.finished(row, column, seed) is None:
                cell = study.compute(row, column, seed)
                computed += 1
                console.print(
                    f"{number}/{len(wanted)} {row.name}, {column.task}, seed {seed}: {column.metric} "
                    f"{cell['scores'][column.metric]} in {cell['seconds']} s"
                )
    return figures(study, rows, columns)


def figures(study: Study, rows: list[Row], columns: list[Column]) -> dict[str, Any]:
    """The tables, from the finished cells; None where there is none. A pair is compared over the seeds that
    both have."""
    each: dict[tuple[str, str], dict[int, Any]] = {}
    computed: dict[str, set[str]] = {}
    for row in rows:
        for column in columns:
            found = {seed: study.finished(row, column, seed) for seed in _seeds(row, column)}
            each[row.name, column.task] = {seed: cell["each"] for seed, cell in found.items() if cell}
            for cell in filter(None, found.values()):
                computed.setdefault(machine(cell["setting"]), set()).add(cell["setting"]["commit"])
    scores: list[dict[str, Any]] = [
        {"name": row.name, **{c.task: _shown(c, list(each[row.name, c.task].values())) for c in columns}}
        for row in rows
        if not row.first_task_only
    ]
    differences = []
    for row in rows:
        for column in columns:
            ours, theirs = (each.get((name or "", column.task), {}) for name in (row.name, row.against))
            if both := sorted(ours.keys() & theirs.keys()):
                pair = (counts([own[seed] for seed in both]) for own in (ours, theirs))
                difference = paired_difference(column.metric, *pair)
                differences.append(
                    {
                        "pair": f"{row.name} − {row.against}",
                        "task": column.task,
                        "difference": f"{difference.value:+.2f}",
                        "interval": f"{difference.low:+.2f} … {difference.high:+.2f}",
                        "holds_zero": "yes" if difference.low <= 0 <= difference.high else "no",
                    }
                )
    trained = [row for row in rows if row.method is not None and not row.first_task_only]
    settings = [
        {
            "task": c.task,
            "metric": c.metric,
            "train": c.train,
            "epochs": c.epochs,
            "test": c.test,
            "seeds": _of_all(
                min((len(each[row.name, c.task]) for row in trained), default=0),
                len(c.seeds),
            ),
        }
        for c in columns
    ]
    return {
        "model": study.name,
        "computed": {on: sorted(commits) for on, commits in sorted(computed.items())},
        "scores": scores,
        "differences": differences,
        "settings": settings,
        "methods": [row for c in columns if c.task == COLUMNS[0].task for row in _methods(study, rows, c)],
    }


def _methods(study: Study, rows: list[Row], column: Column) -> list[dict[str, Any]]:
    """One seed of one task under every method: what it takes, and whether it learns."""
    shown = []
    for row in rows:
        cell = None if row.method is None else study.finished(row, column, column.seeds[0])
        if cell is not None:
            training = cell["training"]
            shown.append(
                {
                    "name": row.name,
                    "commit": cell["setting"]["commit"],
                    "parameters": f"{training['parameters']:,}",
                    "learning_rate": f"{row.learning_rate:g}",
                    "validation_loss": training["validation_loss"],
                    "score": cell["scores"][column.metric],
                }
            )
    return shown


def _of_all(done: int, asked: int) -> str:
    return str(asked) if done == asked else f"{done} of {asked}"


def _shown(column: Column, each: list[Any]) -> str | None:
    """Mean over the finished seeds, and the least and the most."""
    if not each:
        return None
    of_seeds = sorted(mean_score(column.metric, seed[None]) for seed in counts(each))
    mean = f"{statistics.mean(of_seeds):.1f}"
    return mean if len(of_seeds) == 1 else f"{mean} ({of_seeds[0]:.1f}–{of_seeds[-1]:.1f})"


def _seeds(row: Row, column: Column) -> tuple[int, ...]:
    elsewhere = row.first_task_only and column.task != COLUMNS[0].task
    return () if elsewhere else column.seeds[: row.seeds]


def _sized(column: Column, size: float) -> Column:
    train, test = (max(16, round(n * size)) for n in (column.train, column.test))
    return Column(column.task, column.metric, train, column.epochs, test, column.max_tokens, column.seeds)


def _is_known(row: Row, console: Console) -> bool:
    known = row.method is None or row.method in METHODS
    if not known:
        console.print(f"no row '{row.name}': this version has no method {row.method}")
    return known
