"""One benchmark from its flags to bench/results/NAME.json and NAME.png."""

import importlib
import json
from pathlib import Path

from rich.console import Console

from bench import pictures
from bench.flags import Flags
from bench.kinds import RESULTS
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
    stored = json.loads(path.read_text(encoding="utf-8"))
    try:
        pictures.draw(name, stored, path.with_suffix(".png"))
        if name == "peers" and not arguments.smoke:
            pictures.draw_headline(RESULTS, pictures.HEADLINE)
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install -e '.\\[bench]')")
    console.print(f"written {path}")
    return path
