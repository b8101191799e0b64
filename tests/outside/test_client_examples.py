"""The scripts of examples/clients, each with the library that it is for, against the running stack."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.outside.asking import Outside
from tests.outside.clients import interpreter, python

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).parents[2] / "examples" / "clients"


def run(command: list[str], outside: Outside, tmp_path: Path, **environment: str) -> str:
    """What it said. Fails with it unless it ended well."""
    where = {"PRAD_API_URL": str(outside.stack.api.base_url), "PRAD_TASK": "red", "HOME": str(tmp_path)}
    where["PYTHONPATH"] = ""  # what is there is for this interpreter
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | where | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_a_script_of_the_examples_runs(outside: Outside, tmp_path: Path, script: str) -> None:
    said = run([python("litellm"), str(SCRIPTS / script)], outside, tmp_path)
    assert "batches are off" not in said
    assert "has none, so" not in said, "the model's template has tools"


def test_so_does_the_one_for_curl(outside: Outside, tmp_path: Path) -> None:
    said = run(["sh", str(SCRIPTS / "with_curl.sh")], outside, tmp_path)
    assert '"object":"batch"' in said.replace(" ", "")


def test_so_does_vllm_s_benchmark(outside: Outside, reading_model: Path, tmp_path: Path) -> None:
    """Every request of both tasks is answered whole, by its own count."""
    own = {"VLLM": interpreter("VLLM"), "PRAD_TASKS": "red green", "PRAD_TOKENIZER": str(reading_model)}
    own |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    more = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "report.json"]
    run(["sh", str(SCRIPTS / "vllm_bench_serve.sh"), *more], outside, tmp_path, **own)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["completed"], report["failed"]) == (32, 0)
    assert report["total_output_tokens"] == 32 * 16
