"""Beam searches from outside: they find what a search in this process finds, beside other requests, from one
prompt pass, and again after decode was killed amid one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.adapters import load_adapter
from prad.artefact import Artefact
from prad.core.search import Beams, Limits
from prad.lm import LanguageModel
from tests.conftest import EOS, RunningStack, StackMaker, random_artefact
from tests.generation import recomputing, search
from tests.stack.test_chunked_prompts import metric, until

PROMPT = [i % 119 for i in range(40)]


@dataclass(frozen=True)
class Case:
    """The processes, and what they serve. decode: where its metrics are."""

    running: RunningStack
    model: LanguageModel
    tasks: dict[str, Artefact]
    decode: str

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "use_beam_search": True, "raw_prompt": True, **fields}
        return self.running.api.post("/v1/completions", json=body)

    def texts(self, **fields: Any) -> list[str]:
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def expected(self, task: str | None, beams: Beams, choices: int, max_tokens: int) -> list[str]:
        """The texts of a search in this process."""
        adapter = None if task is None else load_adapter(self.tasks[task], self.model)
        anew = recomputing(self.model, len(PROMPT), adapter)
        found = search(anew, PROMPT, Limits(max_tokens, frozenset({EOS})), beams)
        return [" ".join(f"t{t}" for t in tokens if t != EOS) for tokens in found.hypotheses[:choices]]

    def running_sequences(self) -> float:
        lines = httpx.get(self.decode).text.splitlines()
        (value,) = (each.split()[1] for each in lines if each.startswith("prad_decode_running_sequences "))
        return float(value)


@pytest.fixture(scope="module")
def case(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
    unused_tcp_port_factory: Callable[[], int],
) -> Iterator[Case]:
    root, model, port = tmp_path_factory.mktemp("beams"), load_tiny("llama"), unused_tcp_port_factory()
    tasks = {
        method: random_artefact(root / "adapters" / method, model, seed=3, method=method)
        for method in ("prad-pa", "para")
    }
    where = tiny_model("llama"), root / "adapters", root
    with running_stack(*where, prefill={"max_waiting": 8}, metrics_port=port) as running:
        yield Case(running, model, tasks, f"http://127.0.0.1:{port}/metrics")


def test_searches_beside_others_find_what_one_in_this_process_finds(case: Case) -> None:
    asked: list[tuple[str | None, Beams, int]] = [
        ("prad-pa", Beams(3), 1),
        ("prad-pa", Beams(4, 2.0, None), 4),
        ("para", Beams(3, 0.5), 2),
        (None, Beams(2, 1.0, True), 2),
    ]
    plain = {"use_beam_search": False, "n": 3, "seed": 5, "temperature": 0.8, "max_tokens": 60}
    alone = case.texts(**plain)
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        beside = pool.submit(case.texts, **plain)
        found = [
            pool.submit(
                case.texts,
                n=choices,
                best_of=beams.width,
                length_penalty=beams.length_penalty,
                early_stopping="never" if beams.early_stopping is None else beams.early_stopping,
                max_tokens=36,
                **({} if task is None else {"task": task}),
            )
            for task, beams, choices in asked
        ]
        for (task, beams, choices), texts in zip(asked, found, strict=True):
            assert [text.strip() for text in texts.result()] == case.expected(task, beams, choices, 36)
        assert beside.result() == alone


def test_a_search_is_one_prompt_pass_and_is_not_queued_again(case: Case) -> None:
    """Of eight prompts that may wait, sixteen hypotheses are one."""

    def computed() -> float:
        names = ("looked_up_tokens", "hit_tokens")
        looked_up, hit = (metric(case.running, f"prad_prefill_prefix_{name}_total") for name in names)
        return looked_up - hit

    before = computed()
    answer = case.ask(prompt=PROMPT[::-1], best_of=16, max_tokens=30, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 30
    assert computed() - before == len(PROMPT)


def test_a_search_begins_anew_when_decode_is_killed_amid_it(case: Case) -> None:
    wanted = {"task": "prad-pa", "best_of": 8, "n": 2, "max_tokens": 400, "ignore_eos": True}
    expected = case.texts(**wanted)
    (decode,) = (each for each in case.running.stack.services if each.name == "decode")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(case.texts, **wanted)
        until(lambda: asked.done() or case.running_sequences() == 8)
        assert not asked.done()
        decode.process.kill()
        decode.process.wait()
        case.running.stack.restart("decode")
        assert asked.result() == expected
    assert case.texts(best_of=2, max_tokens=2)
