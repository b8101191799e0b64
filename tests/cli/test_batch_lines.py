"""The files of `prad batch`: what no request can hold is named, and an answer tells what it ignored."""

import json
from pathlib import Path

import pytest

from prad_cli.batch_lines import AnswerFile, BatchFileError, names_of


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ("NaN", "not JSON compliant"),
        ('"\\ud800"', "surrogates not allowed"),
    ],
)
def test_what_no_request_can_hold_is_named_by_its_line(tmp_path: Path, prompt: str, why: str) -> None:
    path = tmp_path / "in.jsonl"
    line = '{"custom_id": "%s", "method": "POST", "url": "/v1/completions", "body": {"prompt": %s}}\n'
    path.write_text(line % ("a", '"x"') + line % ("b", prompt), encoding="utf-8")
    with pytest.raises(BatchFileError, match=f"line 2: .*{why}"):
        names_of(path)


def test_an_answer_tells_what_it_ignored(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as answers:
        answers.add("a", 200, {"x-request-id": "r1", "x-prad-ignored-fields": "foo"}, {})
        answers.add("b", 200, {"x-request-id": "r2"}, {})
    first, second = (json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines())
    assert (first["request_id"], first["prad"]) == ("r1", {"ignored_fields": "foo"})
    assert "prad" not in second
