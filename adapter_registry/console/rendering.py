"""Templates, and how numbers and times are written in them."""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adapter_registry.access import Guard
from adapter_registry.messages import HistoryLine
from adapter_registry.routing import Routing
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import quantile
from prad import __version__

BASE = "/console"
STATIC = Path(__file__).with_name("static")
_TEMPLATES = Path(__file__).with_name("templates")
_UNITS = ("B", "KiB", "MiB", "GiB")


class Renderer:
    """Makes pages, and the parts of them that are exchanged in place."""

    def __init__(self, guard: Guard, settings: RegistrySettings) -> None:
        self._guard = guard
        self._environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals |= {
            "base": BASE,
            "prad_version": __version__,
            "playground": settings.api_url is not None,
        }
        self._environment.filters |= {
            "ago": ago,
            "size": size,
            "seconds": seconds,
            "percent": percent,
            "rate": rate,
            "quantile": quantile,
            "routed": routed,
            "happened": happened,
            "name_class": name_class,
        }

    async def show(
        self, request: Request, template: str, *, status: int = 200, notice: str = "", **context: object
    ) -> Response:
        """`notice`: said above everything else."""
        visitor = await self._guard.visitor(request)
        text = self._environment.get_template(template).render(
            visitor=visitor, notice=notice, at=request.url.path, **context
        )
        return HTMLResponse(text, status, {"cache-control": "no-store"})


def in_place(request: Request) -> bool:
    """Whether htmx asks, for a part of the page that it has."""
    return request.headers.get("hx-request") == "true"


def ago(at: str | None) -> str:
    """How long ago a time of the registry's was."""
    if not at:
        return ""
    gone = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if gone >= length:
            return f"{gone // length:.0f} {unit} ago"
    return "just now" if gone < 5 else f"{gone:.0f} s ago"


def size(count: float) -> str:
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".") + " %"


def rate(count: float, over: float) -> str:
    """A second, of what came in that many seconds."""
    each = count / over
    return f"{each:.0f}" if each >= 100 or not each else f"{each:.1f}" if each >= 0.1 else "< 0.1"


def routed(routing: Routing) -> str:
    """A routing in one line."""
    parts = []
    if routing.split:
        parts.append(" ".join(f"{number}={weight}" for number, weight in routing.split.items()))
    parts += [f"{name}→{number}" for name, number in routing.aliases.items()]
    parts += [f"shadow {number}={share:g} %" for number, share in routing.shadow.items()]
    return ", ".join(parts) or "nothing"


def happened(line: HistoryLine) -> str:
    """What a change did, beside the name of its event."""
    moved = [] if line.before is line.after else [f"{line.before or 'new'} → {line.after}"]
    now = [] if line.routing is None else [f"routing: {routed(line.routing)}"]
    return "; ".join([*moved, *now])


def name_class(number: int) -> str:
    """The colour of a version: the same in bars, tables and charts."""
    return f"c{number % 8}"


def joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def shares(split: Mapping[int, int]) -> dict[int, float]:
    """Weights in percent of all."""
    total = sum(split.values())
    return {number: 100 * weight / total for number, weight in split.items()}


def sliders(split: Mapping[int, int]) -> dict[int, int]:
    """The same in whole percents that add up to 100: who loses most by rounding down gets one more."""
    exact = shares(split)
    whole = {number: int(share) for number, share in exact.items()}
    short = sorted(exact, key=lambda number: whole[number] - exact[number])[: 100 - sum(whole.values())]
    return {number: share + (number in short) for number, share in whole.items()}


def scalars(values: Mapping[str, object]) -> dict[str, str]:
    """Of a record, what fits into a line each."""
    found = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
    return {re.sub(r"[_-]+", " ", str(key))[:60]: str(value)[:120] for key, value in found.items()}
