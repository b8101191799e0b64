"""What the benchmark of greedy tokens counts: places up to the end, ties, and the engine's own choices."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.greedy import Winners, _agreeing, _until_the_end
from bench.own_engine import OwnEngine
from bench.prompts import CHAT, task_prompts
from prad.lm import LanguageModel

PROMPTS = [[3, 1, 4], list(range(20, 60)), [9] * 16, [7, 8]]


def test_forced_on_its_own_answers_it_gives_them_again(load_tiny: Callable[[str], LanguageModel]) -> None:
    engine = OwnEngine(load_tiny("llama"))
    answers = engine.answers(PROMPTS, 20)
    assert Winners.of(list(engine.forced(PROMPTS, answers)), dim=1).tokens.tolist() == answers


def test_what_is_fed_is_what_the_next_token_sees(load_tiny: Callable[[str], LanguageModel]) -> None:
    engine = OwnEngine(load_tiny("llama"))
    answers = engine.answers(PROMPTS, 4)
    others = [[(token + 1) % 100 for token in answer] for answer in answers]
    found, other = (list(engine.forced(PROMPTS, each)) for each in (answers, others))
    assert torch.equal(found[0], other[0])
    assert not torch.isclose(found[1], other[1]).all(dim=1).any()
    whole = engine.forced([[*p, *o[:2]] for p, o in zip(PROMPTS, others, strict=True)], [[0]] * 4)
    torch.testing.assert_close(other[2], next(whole), rtol=1e-4, atol=1e-4)


def test_a_tie_is_told_and_its_lowest_id_is_taken() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    greedy = Winners.of([logits, logits.flip(1)], dim=1)
    assert greedy.tokens.tolist() == [[1, 0], [3, 0]]
    assert greedy.tied.tolist() == [[True, True], [False, False]]


def test_places_behind_the_end_token_do_not_count() -> None:
    said = _until_the_end(torch.tensor([[5, 9, 5, 9], [9, 1, 1, 1], [1, 2, 3, 4]]), torch.tensor([9, 8]))
    assert said.sum(dim=1).tolist() == [2, 1, 4]
    right = torch.tensor([[5, 9, 0, 0], [9, 0, 0, 0], [1, 2, 3, 0]])
    tokens = torch.tensor([[5, 9, 5, 9], [9, 1, 1, 1], [1, 2, 3, 4]])
    greedy = Winners(tokens, torch.zeros_like(said))
    assert _agreeing(greedy, right, said, slice(None)) == pytest.approx(100 * 6 / 7, abs=0.01)
    assert _agreeing(greedy, right, said, slice(0, 2)) == 100.0
    assert _agreeing(greedy, right, said, slice(0, 0)) is None


def test_tasks_give_prompts_in_turn(tmp_path: Path) -> None:
    for task, count in (("b", 3), ("a", 1)):
        (tmp_path / task).mkdir()
        lines = [json.dumps({"prompt": f"{task}{i}", "completion": ""}) + "\n" for i in range(count)]
        (tmp_path / task / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    assert task_prompts(tmp_path, 4) == ["a0", "b0", "b1", "b2"]
    assert task_prompts(tmp_path, 2) == ["a0", "b0"]
    with pytest.raises(ValueError, match="has 4 prompts"):
        task_prompts(tmp_path, 5)
    assert len(set(CHAT)) == 50
