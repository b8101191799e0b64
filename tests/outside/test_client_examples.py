"""The scripts of examples/clients, each with the library that it is for, against the running stack."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.outside.asking import Outside
from tests.outside.clients import python

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).parents[2] / "examples" / "clients"


def run(command: list[str], outside: Outside, tmp_path: Path) -> str:
    """What it said. Fails with it unless it ended well."""
    where = {"PRAD_API_URL": str(outside.stack.api.base_url), "PRAD_TASK": "red", "HOME": str(tmp_path)}
    where["PYTHONPATH"] = ""  # what is there is for this interpreter
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | where,
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


def test_so_does_the_one_for_curl(outside: Outside, tmp_path: Path) -> None:
    said = run(["sh", str(SCRIPTS / "with_curl.sh")], outside, tmp_path)
    assert '"object":"batch"' in said.replace(" ", "")
