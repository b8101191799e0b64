"""docs/settings.md says what the settings' classes say."""

from pathlib import Path

import pytest

from deploy import settings_reference
from deploy.settings_reference import check, document, main


def test_the_committed_reference_is_the_classes() -> None:
    assert check() == [], "python -m deploy.settings_reference writes it again"


@pytest.mark.parametrize(
    "row",
    [
        "| `--port` | `PRAD_PREFILL_PORT` | whole number ≥ 0 ≤ 65535 | `8000` | Port that ",
        "| `--shared-memory` / `--no-shared-memory` | `PRAD_DECODE_SHARED_MEMORY` | yes or no | yes | ",
        "| `--kv-wire` | `PRAD_PREFILL_KV_WIRE` | `raw`, `int8` | `raw` | ",
        "| `--metrics-port` | `PRAD_DECODE_METRICS_PORT` | whole number ≥ 0 ≤ 65535 | – | ",
    ],
)
def test_a_row_has_flag_variable_bounds_and_default(row: str) -> None:
    assert row in document()


def test_a_stale_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "settings.md"
    stale.write_text(document().replace("`8000`", "`80`"), encoding="utf-8")
    monkeypatch.setattr(settings_reference, "DOCUMENT", stale)
    assert main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "| `80` |" in said
    assert "python -m deploy.settings_reference" in said
    assert main([]) == 0
    assert main(["--check"]) == 0
