"""Text is UTF-8 wherever we run: an encoding is named, the locale's is none of ours."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "prad",
    "kvtransfer",
    "decode_service",
    "prefill_service",
    "adapter_registry",
    "local_stack",
    "prad_cli",
    "bench",
    "deploy",
    "tests",
)
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "_pb2" not in p.name)


def unnamed(source: str) -> Iterator[int]:
    """Lines that read or write text in the locale's encoding, beside what ruff's PLW1514 finds."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = {keyword.arg for keyword in call.keywords}
            text = name in ("read_text", "write_text", "fdopen") or (
                "text" in given and name in ("run", "Popen")
            )
            binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab") for a in call.args)
            if text and not binary and "encoding" not in given:
                yield call.lineno


def test_it_finds_what_it_looks_for() -> None:
    assert list(unnamed("p.read_text()\np.write_text('a')\nsubprocess.run(c, text=True)")) == [1, 2, 3]
    assert not list(unnamed("p.read_text(encoding='utf-8')\nsubprocess.run(c)\np.read_bytes()"))


def test_text_has_its_encoding_named() -> None:
    found = {p.relative_to(ROOT): list(unnamed(p.read_text(encoding="utf-8"))) for p in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}
