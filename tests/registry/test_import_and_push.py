"""`prad adapter import --task`: from PEFT's folder straight into a running registry."""

from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from prad.exchange import export_folder
from prad.lm import LanguageModel
from prad_cli.adapter import app
from tests.conftest import random_artefact


def test_an_import_is_pushed(
    registry,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model = load_tiny("llama")
    artefact = random_artefact(tmp_path / "a", model, 1, method="prad-lora", config={}, licence="MIT")
    export_folder(artefact, tmp_path / "peft", model)
    command = ["import", str(tmp_path / "peft"), "--task", "support", "--no-wait", "--description", "mine"]
    where = ["--model", str(tiny_model("llama")), "--registry", registry.url]
    result = CliRunner().invoke(app, [*command, *where])
    assert result.exit_code == 0, result.output
    assert "support@1 pushed (prad-lora" in result.stdout
    record = registry.client.version("support", 1).record
    assert (record.method, record.licence, record.description) == ("prad-lora", "MIT", "mine")
