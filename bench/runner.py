"""One benchmark from its flags to bench/results/NAME.json and NAME.png.

python -m bench.runner decode --smoke
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from bench.record import RESULTS, write_result
from prad.cli.serve import stopped_by_signals

NAMES = (
    "table4",
    "serve",
    "decode",
    "step",
    "para",
    "floor",
    "handoff",
    "rounding",
    "prefill",
    "chunking",
    "peers",
    "quality",
    "train",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.runner")
    parser.add_argument("name", choices=NAMES)
    known, rest = parser.parse_known_args(arguments)
    run(known.name, rest)


def run(name: str, flags: Sequence[str]) -> Path:
    """Runs `prad bench NAME FLAGS`; returns where the JSON lies. argparse's SystemExit for a wrong flag."""
    module = importlib.import_module(f"bench.{name}")
    arguments = _parse(name, module, flags)
    console = Console(stderr=True)
    console.print(f"[bold]{name}[/]" + (" (smoke: the figures mean nothing)" if arguments.smoke else ""))
    with stopped_by_signals():  # the servers that a benchmark starts end with it
        figures = module.run(arguments)
    path = write_result(name, figures, arguments, arguments.out)
    if hasattr(module, "plot"):
        _save_plot(module, figures, path.with_suffix(".png"), console)
    console.print(f"written {path}")
    return path


def _parse(name: str, module: ModuleType, flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"prad bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n  prad bench {name} --smoke\n  prad bench {name} --out bench/results",
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default bench/results, smoke: a /smoke below)"
    )
    if "--smoke" in flags:
        parser.set_defaults(**module.SMOKE)
    arguments = parser.parse_args(flags)
    if getattr(arguments, "rounds", 1) < 1:
        parser.error("--rounds: expected at least 1")
    if arguments.out is None:
        arguments.out = RESULTS / "smoke" if arguments.smoke else RESULTS
    return arguments


def _save_plot(module: ModuleType, figures: dict[str, Any], path: Path, console: Console) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install -e '.\\[bench]')")
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    module.plot(figures, figure)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
