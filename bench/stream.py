"""One request alone, beside others: who is in `peers`, but for those with LoRAs.

Our decode services make no drafts here, for the reason that `peers` gives: see `speculation` for what they
bring.
"""

from typing import Any

from bench.flags import Stream
from bench.model import load
from bench.peers import few, running


def run(arguments: Stream) -> dict[str, Any]:
    model = load(arguments)
    with running(arguments, model) as (everybody, versions):
        return {
            "model": arguments.model,
            "peers": versions,
            "one": few(everybody, arguments, model, 1),
        }


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["one"][::-1]
    bars = axes.barh([row["name"] for row in rows], [row["step_ms"] for row in rows])
    axes.bar_label(bars, [f"{row['step_ms']:.1f}" for row in rows], padding=3)
    axes.set(xlabel="ms a token, after the first")
    axes.margins(x=0.1)
