"""`prad adapter import` and `export` as they are typed."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig

from prad.artefact import read_artefact
from tests import forked
from tests.exchange.peft_side import IGNORED, apart, base, loaded, said, saved

pytestmark = pytest.mark.filterwarnings(*IGNORED)
ENVIRONMENT = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


def prad(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return forked.prad("adapter", *arguments, environment=ENVIRONMENT)


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        (
            "import",
            ["SRC", "DIR", "--task", "--template", "--allow-other-base", "prad adapter import my-lora"],
        ),
        ("export", ["DIR", "OUT", "--base", "prad adapter export adapters/mine"]),
    ],
)
def test_help_with_examples(command: str, mentioned: list[str]) -> None:
    ended = prad(command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for word in mentioned:
        assert word in ended.stdout


def test_a_lora_comes_in_and_goes_out(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    expected = saved(folder, tmp_path / "peft", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    told = ["--template", "Q: {prompt} A:", "--max-tokens", "7", "--licence", "MIT", "--model", folder]
    ended = prad("import", tmp_path / "peft", tmp_path / "ours", *told)
    assert ended.returncode == 0, ended.stderr
    assert "prad-lora for llama" in ended.stdout
    assert "it was trained on all positions" in ended.stdout
    assert "note: the file names" not in ended.stdout, "that folder is here: its weights are compared"
    assert f"prad eval --adapter {tmp_path / 'ours'} --data FILE --model {folder}" in ended.stdout
    record = read_artefact(tmp_path / "ours").record
    assert (record.template, record.generation.max_tokens, record.licence) == ("Q: {prompt} A:", 7, "MIT")

    config = tmp_path / "peft" / "adapter_config.json"
    elsewhere = {"base_model_name_or_path": f"/there/{folder.name}"}
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | elsewhere), encoding="utf-8"
    )
    ended = prad("import", tmp_path / "peft", tmp_path / "named", *told)
    assert f"note: the file names /there/{folder.name}, as --model does; PEFT keeps no digest" in ended.stdout

    ended = prad("export", tmp_path / "ours", tmp_path / "back", "--model", folder)
    assert ended.returncode == 0, ended.stderr
    assert "PeftModel.from_pretrained" in ended.stdout
    assert apart(said(loaded(folder, tmp_path / "back")), expected) < 1e-4
    assert apart(said(base(folder)), expected) > 1e-2

    ended = prad("import", tmp_path / "peft", tmp_path / "all", "--positions", "all", "--model", folder)
    assert ended.returncode == 0, ended.stderr
    assert "a baseline, to be evaluated and not served" in ended.stdout
    assert "prad adapter push" not in ended.stdout
    ended = prad("export", tmp_path / "all", tmp_path / "all-back", "--model", folder)
    assert ended.returncode == 0, ended.stderr
    assert "generated tokens too" not in ended.stdout, "that is what it was trained for"


def test_mistakes_are_one_line(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    ended = prad("import", tmp_path / "nowhere", tmp_path / "out", "--model", folder)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: there is no folder {tmp_path / 'nowhere'}")
    assert len(ended.stderr.strip().splitlines()) == 1
    ended = prad("import", tmp_path / "nowhere", "--model", folder)
    assert ended.returncode == 2
    assert "name a DIR to write, or a --task to push to" in ended.stderr
    ended = prad("import", tmp_path / "nowhere", "--task", "x", "--positions", "all", "--model", folder)
    assert ended.returncode == 2
    assert "what acts on all positions is not served" in ended.stderr
