"""Serving does without the extras; a command that does not says in one line what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache import CACHE
from tests.cli.test_command_line import ENVIRONMENT, one_line

CHECKOUT = Path(__file__).parents[2]
OF_EXTRAS = ("accelerate", "matplotlib", "peft", "psutil", "rouge_score", "sacrebleu")
SERVING = "prad_cli.app, prad_cli.serve, local_stack.stack, adapter_registry.server, decode_service.server, "
SERVING += "prefill_service.server"


@pytest.fixture
def without_extras(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python to which what the extras bring is not installed."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in OF_EXTRAS)]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text("\n".join(lines), encoding="utf-8")
    here = [str(tmp_path / "bare"), str(CHECKOUT)]
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(here)}


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.long)])
def test_serving_needs_none(kept: bool, without_extras: dict[str, str], tmp_path: Path) -> None:
    """Its imports, and what the first start does: the default model is converted and loaded. Where it is kept
    from an earlier conversion that is not made again."""
    program = (
        f"import {SERVING}, torch\nfrom pathlib import Path\n"
        "from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint\n"
        "from prad.lm import DEFAULT_MODEL, LanguageModel, Tokenizer, resolve_model\n"
        f"folder = resolve_model(DEFAULT_MODEL, Path({str(CACHE if kept else tmp_path)!r}))\n"
        "LanguageModel.load(folder, dtype=torch.bfloat16)\nTokenizer(folder)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=without_extras, check=True)


@pytest.mark.parametrize(
    ("command", "extra", "missing"),
    [
        ("train --task a --data . --out out", "train", "accelerate is not"),
        ("eval --adapter . --data data.jsonl", "eval", "rouge_score and sacrebleu are not"),
        ("eval --url http://127.0.0.1:1 --data data.jsonl", "eval", "rouge_score and sacrebleu are not"),
        (
            "bench floor --smoke",
            "bench",
            "accelerate and peft and psutil and rouge_score and sacrebleu are not",
        ),
    ],
)
def test_a_command_without_its_extra_is_one_line(
    command: str, extra: str, missing: str, without_extras: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "prad_cli", *command.split()],
        cwd=tmp_path,
        env=without_extras,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert one_line(ended.stderr) == (
        f"error: {missing} installed; run: {sys.executable} -m pip install -e '{CHECKOUT}[{extra}]'"
    )
    assert not (tmp_path / "out").exists()
