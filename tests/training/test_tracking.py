"""How far an evaluation is, where nobody looks at a terminal; and how long the plain model may go on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from prad.lm import Tokenizer
from prad.training.evaluate import plain_answer_tokens
from prad.training.progress import ProgressLine
from prad.training.tracking import tracked


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("prad.training.tracking.time.monotonic", lambda: now[0])
    for item in tracked("abcdef", 6, "evaluating"):
        now[0] += 25 if item in "ce" else 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "evaluating: 3 of 6\nevaluating: 5 of 6\n"


def test_a_training_run_says_how_far_it_is_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("prad.training.progress.time.monotonic", lambda: now[0])
    line, run, control = ProgressLine(), TrainerState(max_steps=4), TrainerControl()
    line.on_train_begin(None, run, control)
    for step in range(1, 5):
        line.on_step_begin(None, run, control)
        now[0] += 7
        run.global_step, run.num_input_tokens_seen = step, 70 * step
        line.on_step_end(None, run, control)
        line.on_log(None, run, control, {"loss": 1 / step})
    line.close()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "2 of 4 steps  loss 1.0000  10 tokens/s\n4 of 4 steps  loss 0.3333  10 tokens/s\n"


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked("abc", 3, "evaluating")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_the_plain_model_goes_on_for_twice_the_longest_right_answer(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    lines = [
        {"prompt": "t1", "completion": "t5"},
        {"prompt": "t2", "completion": "t5", "references": ["t5 t6"]},
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert plain_answer_tokens(tokenizer, path) == 2 * len(tokenizer.encode_completion("t5 t6"))
    assert plain_answer_tokens(tokenizer, path, limit=1) == 2 * len(tokenizer.encode_completion("t5"))
