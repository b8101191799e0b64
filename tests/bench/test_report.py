"""What the documents say of several kinds of CPU: each by its name, and which of them is not measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gates import Gate, table
from bench.pictures import drawn
from bench.report import render

SETTING = {
    "commit": "abc1234",
    "when": "2026-11-29T00:00:00+00:00",
    "cpu": "2 x CPU, family 25, model 1 (avx2)",
}
DOCUMENT = """\
<!-- table floor gemms | batch: rows | own_ms: ours | packed_ms: packed -->
<!-- end -->

Prose.

<!-- pictures floor: The floor -->
old
<!-- end -->
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    stored(tmp_path, "amx", "floor", gemms=[{"batch": 1, "own_ms": 2.5, "packed_ms": 3.0}])
    stored(tmp_path, "avx512", "floor")  # of before there was such a list
    stored(tmp_path, "avx2", "decode")
    (tmp_path / "amx" / "floor.png").touch()
    return tmp_path


def stored(results: Path, kind: str, name: str, **figures: Any) -> None:
    (results / kind).mkdir(exist_ok=True)
    (results / kind / f"{name}.json").write_text(json.dumps({"setting": SETTING} | figures), encoding="utf-8")


def test_a_table_has_its_kind_above_it_and_says_who_has_none(results: Path) -> None:
    assert (
        render(DOCUMENT, results)
        == """\
<!-- table floor gemms | batch: rows | own_ms: ours | packed_ms: packed -->

**`amx`**, `floor` at abc1234, 2026-11-29, 2 x CPU, family 25, model 1 (avx2):

| rows | ours | packed |
| --- | --- | --- |
| 1 | 2.5 | 3 |

Not measured on `avx512`, `avx2`: `prad bench floor`.

<!-- end -->

Prose.

<!-- pictures floor: The floor -->

![The floor, amx](../bench/results/amx/floor.png)

<!-- end -->
"""
    )


def test_writing_it_again_changes_nothing(results: Path) -> None:
    once = render(DOCUMENT, results)
    assert render(once, results) == once


def test_a_column_that_nobody_has_is_left_out(results: Path) -> None:
    stored(results, "amx", "floor", gemms=[{"batch": 1, "own_ms": 2.5}])
    assert "| rows | ours |\n" in render(DOCUMENT, results)


def test_without_any_result_the_benchmark_is_named(tmp_path: Path) -> None:
    assert "\nNot measured yet: `prad bench floor`.\n" in render(DOCUMENT, tmp_path)


def test_a_result_of_no_kind_is_everybodys(results: Path) -> None:
    (results / "floor.json").write_text(
        (results / "amx" / "floor.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    said = render(DOCUMENT, results)
    assert "\n`floor` at abc1234" in said
    assert "Not measured" not in said


def test_a_gate_is_a_cell_for_each_kind_and_its_age_stands_below(results: Path) -> None:
    gate = Gate("ours", 3, 2, " ms", "floor", lambda result: float(result["gemms"][0]["own_ms"]))
    lines = table([gate], [results / kind for kind in ("amx", "avx2")]).splitlines()
    assert lines[0] == "|  | gate | goal | amx | avx2 | by |"
    assert lines[2] == "| ours | ≤ 3 ms | ≤ 2 ms | 2.5 ms, gate | – | floor |"
    assert lines[-1] == "`amx`: floor abc1234 (2026-11-29)."


def test_a_picture_says_where_it_was_measured() -> None:
    row = {"name": "a file", "tokens_per_s": 1.0}
    figure = drawn("batch", {"setting": SETTING, "rows": [row]})
    assert figure is not None
    assert [text.get_text() for text in figure.texts] == [
        "abc1234, 2026-11-29, 2 x CPU, family 25, model 1 (avx2)"
    ]
