"""The picture of each result, drawn by its benchmark's `plot`; and the headline: 64 tasks, us beside others.

python -m bench.pictures          # draws all of bench/results anew from the JSON, and the headline
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.kinds import KINDS, RESULTS
from bench.known import FLAGS
from bench.record import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADLINE = RESULTS / "headline.png"
_STRIP_INCHES, _TITLE_INCHES = 0.2, 0.25
_OURS = "tasks, PrAd-LoRA"
_SHOWN = ("PrAd server", "vLLM", "OpenVINO", "llama.cpp", "transformers", "PEFT")
_CALLED = {
    "amx": "AMX",
    "avx512-bf16": "AVX-512 BF16",
    "avx512-vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
}


def main() -> None:
    """Draw every picture of bench/results anew."""
    for path in stored():
        draw(path.stem, json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    draw_headline(RESULTS, HEADLINE)


def stored() -> list[Path]:
    """The results of benchmarks: of each kind of CPU, and those that take their time from none."""
    folders = [RESULTS, *(RESULTS / kind for kind in KINDS)]
    return [path for folder in folders for path in sorted(folder.glob("*.json")) if path.stem in FLAGS]


def draw(name: str, figures: Mapping[str, Any], path: Path) -> bool:
    """Whether there is something to see of this benchmark. Raises ImportError without matplotlib."""
    figure = drawn(name, figures)
    if figure is not None:
        figure.savefig(path, dpi=120)
    return figure is not None


def drawn(name: str, figures: Mapping[str, Any]) -> "Figure | None":
    """figures: a stored result, with its setting."""
    module = importlib.import_module(f"bench.{name}")
    if not hasattr(module, "plot"):
        return None
    figure = _figure(9, 4.5)
    module.plot(figures, figure)
    _tell_origin(figure, figures["setting"])
    return figure


def _tell_origin(figure: "Figure", setting: Mapping[str, Any]) -> None:
    """Above everything, since a picture goes without its page: commit, day and CPU."""
    strip, above = _STRIP_INCHES / figure.get_figheight(), 0.0
    if title := figure.get_suptitle():  # which would stay at the top; told where to stand, it keeps no room
        figure.suptitle(title, y=1 - strip, va="top")
        above = _TITLE_INCHES / figure.get_figheight()
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - strip - above))
    text = f"{setting['commit']}, {setting['when'][:10]}, {machine(setting)}"
    figure.text(0.995, 1 - strip / 4, text, ha="right", va="top", fontsize=7, color="gray")


def draw_headline(results: Path, path: Path) -> bool:
    """Whether any kind of CPU has a result of `peers`."""
    figure = headline(results)
    if figure is not None:
        figure.savefig(path, dpi=120)
    return figure is not None


def headline(results: Path) -> "Figure | None":
    """A panel for each kind of CPU: seconds of everybody, and how many times ours."""
    found = [(kind, results / kind / "peers.json") for kind in KINDS]
    panels = {k: json.loads(file.read_text(encoding="utf-8")) for k, file in found if file.is_file()}
    if not panels:
        return None
    figure = _figure(9, 1.2 + 2.6 * len(panels))
    for at, (kind, result) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        _panel(at, result["rows"])
        cpu = result["setting"]["cpu"].rpartition(" (")[0]
        at.set_title(f"{_CALLED.get(kind, kind)}: {cpu}", loc="left", fontsize=10)
    figure.suptitle("64 requests at once, 64 tokens in and out: seconds until all are answered")
    return figure


def _panel(at: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The fastest first; ours and those with 64 adapters in colour."""
    shown = sorted((row for row in rows if _is_shown(row["name"])), key=lambda row: row["total_s"])
    bars = at.barh(
        [row["name"] for row in shown],
        [row["total_s"] for row in shown],
        color=[_colour(row["name"]) for row in shown],
    )
    ratios = [f"{row['total_s']:.1f} s" + _times(row) for row in shown]
    at.bar_label(bars, ratios, padding=4, fontsize=9)
    at.margins(x=0.18)
    at.invert_yaxis()
    at.set_xticks([])
    at.spines[["top", "right", "bottom"]].set_visible(False)


def _is_shown(name: str) -> bool:
    return name.startswith(_SHOWN) and (_OURS in name or not name.startswith("PrAd"))


def _colour(name: str) -> str:
    if _OURS in name:
        return "tab:blue"
    return "tab:orange" if "LoRAs" in name else "lightgray"


def _times(row: Mapping[str, Any]) -> str:
    return "" if _OURS in row["name"] else f" = {row['ours_is_faster']:.3g} × ours"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


if __name__ == "__main__":
    main()
