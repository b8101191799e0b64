"""Whatever is raised on purpose has one root, so that the command line shows it as one line."""

import ast
from pathlib import Path

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
)
NO_ERRORS = {"PradError", "ClientGoneError", "PassBrokeError", "CompileError"}
"""The root; what ends a wait of our own: nobody is shown it; what building a wheel, without us, may say."""


def test_every_tree_of_errors_has_the_same_root() -> None:
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = {
        node.name
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(
            isinstance(base, ast.Name) and base.id in ("Exception", "BaseException") for base in node.bases
        )
    }
    assert found == NO_ERRORS
