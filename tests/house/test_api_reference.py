"""docs/api.md tells every path and every field of what is sent. `make check` compares it to the letter."""

import pytest

from deploy import api_reference
from deploy.api_reference import DOCUMENT, document, documents, main


def test_the_committed_reference_has_every_path_and_field() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [
        f"{method.upper()} {path}"
        for told in documents().values()
        for path, operations in told["paths"].items()
        for method in operations
        if f"### {method.upper()} {path}\n" not in text
    ]
    assert missing == [], "python -m deploy.api_reference writes it again"
    for name in ("CompletionRequest", "ChatRequest"):
        schema = documents()["The API (port 8000)"]["components"]["schemas"][name]
        section = text.partition(f"#### {name}\n")[2].partition("\n#### ")[0]
        assert [field for field in schema["properties"] if f"| `{field}`" not in section] == []


def test_a_stale_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stale = tmp_path_factory.mktemp("docs") / "api.md"
    stale.write_text(document().replace("seed", "sead"), encoding="utf-8")
    monkeypatch.setattr(api_reference, "DOCUMENT", stale)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
