"""No circle of imports, inside a room or out of it; imports within functions and for type checkers count."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "prad",
    "kvtransfer",
    "decode_service",
    "prefill_service",
    "adapter_registry",
    "local_stack",
    "prad_cli",
    "bench",
    "deploy",
)


def _modules() -> dict[str, Path]:
    paths = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def _imported(source: str) -> Iterator[str]:
    """Every name that may be a module's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _order(sources: dict[str, str]) -> list[str]:
    """Modules by name, those that are imported first. Raises CycleError. A package's own face is no module
    here: it imports what lies in it, and that may import its neighbours."""
    graph = {
        name: {n for n in _imported(text) if n in sources and n != name} for name, text in sources.items()
    }
    return list(TopologicalSorter(graph).static_order())


def test_there_is_none() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in _modules().items()}
    assert len(_order(sources)) > 200


def test_one_would_be_found() -> None:
    with pytest.raises(CycleError):
        _order({"a.one": "from a import two", "a.two": "def f():\n    from a.one import x"})
