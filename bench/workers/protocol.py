"""What a worker and the benchmark say to each other: one line of JSON each way.

    bench -> worker   {"prompts": [[id, ...], ...], "output": n, "adapters": [name or null, ...]}
    worker -> bench   {"seconds": s}

A worker that holds no model is asked for something else, which its docstring says.

The first line a worker writes is {"versions": {package: version}}: it is loaded. Its stdin's end stops it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int, list[str | None]], Sequence[int]]


def claim_stdout() -> int:
    """A private copy of stdout for the answers; whatever a library prints goes to stderr from now on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def options() -> dict[str, Any]:
    """What the benchmark wants: the only argument, JSON."""
    loaded: dict[str, Any] = json.loads(sys.argv[1])
    return loaded


def serve(answers: int, packages: Sequence[str], generate: Generate) -> None:
    """Answers requests until stdin ends.

    `generate` returns how many tokens each prompt got: a peer that stops early would look fast.
    """

    def work(asked: dict[str, Any]) -> None:
        counts = generate(asked["prompts"], asked["output"], asked["adapters"])
        if any(count != asked["output"] for count in counts):
            raise SystemExit(f"asked for {asked['output']} tokens each, got {list(counts)}")

    answer(answers, packages, work)


def answer(answers: int, packages: Sequence[str], work: Callable[[dict[str, Any]], None]) -> None:
    """Tells how long `work` took for each message, until stdin ends."""
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        _say(out, {"versions": {name: version(name) for name in packages}})
        for line in sys.stdin:
            asked = json.loads(line)
            started = time.perf_counter()
            work(asked)
            _say(out, {"seconds": time.perf_counter() - started})


def _say(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()
