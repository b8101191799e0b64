"""One benchmark from its flags to bench/results/NAME.json and NAME.png."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from bench.flags import Flags
from bench.record import write_result
from local_stack.signals import stopped_by_signals


def run(name: str, arguments: Flags) -> Path:
    """Runs `prad bench NAME`; returns where the JSON lies."""
    module = importlib.import_module(f"bench.{name}")
    console = Console(stderr=True)
    console.print(f"[bold]{name}[/]" + (" (smoke: the figures mean nothing)" if arguments.smoke else ""))
    with stopped_by_signals():  # the servers that a benchmark starts end with it
        figures = module.run(arguments)
    path = write_result(name, figures, arguments, arguments.out)
    if hasattr(module, "plot"):
        _save_plot(module, figures, path.with_suffix(".png"), console)
    console.print(f"written {path}")
    return path


def _save_plot(module: ModuleType, figures: dict[str, Any], path: Path, console: Console) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install -e '.\\[bench]')")
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    module.plot(figures, figure)
    figure.savefig(path, dpi=120)
