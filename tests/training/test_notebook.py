"""examples/first_task.ipynb does what it says: its cells, one after the other, as a notebook runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_task.ipynb"


def cells() -> list[str]:
    told = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in told["cells"] if cell["cell_type"] == "code"]


def test_its_cells_are_python_and_keep_no_output() -> None:
    for number, cell in enumerate(cells()):
        compile(cell, f"cell {number}", "exec")
    told = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in told["cells"])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_it_trains_evaluates_pushes_and_asks(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(cells()), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert "['question']" in ended.stdout
