"""Presets, and the settings of every method."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prad.adapters import METHODS, AdapterError, find_method
from prad.artefact import FULL, read_artefact
from prad.training.presets import PRESETS, UnknownPresetError, preset_fields, with_own
from prad.training.progress import save_curve
from prad.training.settings import TrainSettings
from prad_cli.app import app

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def test_every_preset_is_one_of_its_methods(tmp_path: Path) -> None:
    for name, preset in PRESETS.items():
        for method in preset.methods or METHODS:
            fields = preset_fields(name, method)
            if method == FULL:
                assert not fields["config"]
            else:
                find_method(method).configure(fields.get("config", {}))
            TrainSettings(tmp_path, tmp_path, method=method, **fields)
    lora = find_method("prad-lora").configure(preset_fields("paper-e2e", "prad-lora")["config"])
    assert (lora.r, lora.factor) == (56, 4.0)
    config = preset_fields("paper-e2e", "prad-lora")["config"]
    assert with_own(config, {"r": 8}) == {"r": 8, "alpha": 32.0}
    assert with_own(config, {"alpha": 1.0}) == {"r": 56, "alpha": 1.0}
    assert preset_fields("paper-sst2", "full")["epochs"] == 5.0, "a method's own wins"
    assert preset_fields("paper-sst2", "prad-pa")["epochs"] == 10.0
    with pytest.raises(UnknownPresetError, match="unknown preset 'x'; known: quick, paper-sst2"):
        preset_fields("x", "prad-pa")
    with pytest.raises(
        UnknownPresetError, match=r"'paper-mnli' is for prad-pa, prad-sa, .* not for prad-ia3"
    ):
        preset_fields("paper-mnli", "prad-ia3")


TABLE_5 = {
    "paper-sst2": {
        "full": (5e-5, 5.0),
        "prad-prefix": (1e-4, 10.0),
        "prad-pa": (1e-3, 10.0),
        "prad-lora": (1e-4, 10.0),
        "prad-dora": (1e-3, 10.0),
    },
    "paper-mnli": {
        "full": (5e-5, 5.0),
        "prad-prefix": (2e-3, 5.0),
        "prad-pa": (2e-3, 5.0),
        "prad-lora": (1e-4, 5.0),
    },
    "paper-e2e": {
        "full": (5e-5, 60_000),
        "prad-prefix": (2e-3, 60_000),
        "prad-pa": (1e-3, 60_000),
        "prad-lora": (5e-4, 60_000),
    },
    "paper-xsum": {
        "full": (5e-5, 60_000),
        "prad-prefix": (1e-3, 60_000),
        "prad-sa": (5e-4, 60_000),
        "prad-pa": (2e-3, 60_000),
        "prad-lora": (5e-4, 60_000),
        "prad-dora": (5e-4, 60_000),
    },
    "paper-xsum-ffn": {"prad-lora": (5e-4, 60_000)},
    "paper-webnlg": {
        "full": (5e-5, 18_000),
        "prad-prefix": (1e-3, 18_000),
        "prad-sa": (5e-4, 18_000),
        "prad-pa": (1e-3, 18_000),
        "prad-lora": (5e-4, 18_000),
    },
    "paper-mt": {
        "full": (5e-5, 60_000),
        "prad-prefix": (2e-3, 60_000),
        "prad-sa": (1e-3, 60_000),
        "prad-pa": (3e-3, 60_000),
        "prad-lora": (6e-4, 60_000),
    },
    "paper-mt-ffn": {"prad-lora": (1e-3, 60_000)},
}
"""Learning rate, and epochs or steps, with GPT-2 Small; batch 32 and warm-up ratio 0.06 everywhere."""

APPENDIX_A = {
    "paper-sst2": (16, 128, None),
    "paper-mnli": (32, 128, None),
    "paper-e2e": (108, 256, 256),
    "paper-webnlg": (108, 256, 256),
    "paper-xsum": (200, 400, 130),
    "paper-mt": (200, 100, 100),
}
"""Width of a bottleneck, longest prompt and longest completion (where the paper says one)."""


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in TABLE_5 for method in TABLE_5[name]])
def test_a_preset_is_the_papers_table(name: str, method: str) -> None:
    fields = preset_fields(name, method)
    length = fields.get("max_steps") or fields["epochs"]
    assert (fields["learning_rate"], length) == TABLE_5[name][method]
    assert (fields["batch"], fields["warmup_ratio"]) == (32, 0.06)


@pytest.mark.parametrize("name", APPENDIX_A)
def test_widths_and_lengths_are_the_papers(name: str) -> None:
    width, prompt, completion = APPENDIX_A[name]
    fields = preset_fields(name, "prad-pa")
    assert (fields["config"]["r"], fields["max_prompt"]) == (width, prompt)
    if completion is not None:
        assert fields["max_completion"] == completion


def test_epochs_win_over_a_presets_steps(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["train", "--task", "toy", "--data", str(data), "--out", str(out), "--preset", "paper-e2e"]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--examples", "40"]
    ended = CliRunner().invoke(app, [*command, "--epochs", "1"])
    assert ended.exit_code == 0, ended.output
    assert read_artefact(out).record.training["steps"] == 2, "not 60,000"


def test_the_documentation_has_every_methods_settings() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| `(\{.*\})` \| .+ \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    documented = [(method, json.loads(config)) for method, config in rows]
    assert dict(documented) == {name: m.config_type().model_dump(mode="json") for name, m in METHODS.items()}
    assert len(documented) == len(METHODS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings_that_are_not_finite_are_refused(method: str) -> None:
    for name, field in find_method(method).config_type.model_fields.items():
        if field.annotation is float:
            for value in (float("nan"), float("inf")):
                with pytest.raises(AdapterError, match=f"{name}: Input should be a finite number"):
                    find_method(method).configure({name: value})


def test_a_curve_without_matplotlib_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setenv("COLUMNS", "200")
    save_curve([], tmp_path)
    assert "(pip install -e '.[train]')" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
