"""`prad eval` through a running server gives what it gives in this process, and says what goes wrong."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from prad.adapters import load_adapter
from prad.artefact import Artefact, GenerationDefaults
from prad.lm import LanguageModel, Tokenizer
from prad.training.evaluate import Evaluation, evaluate
from prad.training.served import ServerError, evaluate_served
from prad_cli.app import app
from tests.conftest import StackMaker, random_artefact

TASKS = {
    "toy": GenerationDefaults(temperature=0.0, max_tokens=36),
    "saying-nothing": GenerationDefaults(),
    "long-answers": GenerationDefaults(max_tokens=300),  # over half of the context
}
TOKENS = "with-task-tokens"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an end token, and one prompt that is longer than the model's context."""
    prompts = [*(f"t{i} t{2 * i} t3" for i in range(40)), " ".join(f"t{i % 119}" for i in range(700))]
    lines = [json.dumps({"prompt": p, "completion": f"t{i} t5 END"}) for i, p in enumerate(prompts)]
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Serving:
    """A server, and the same evaluations here."""

    api: httpx.Client
    model: LanguageModel
    folder: Path
    tasks: dict[str, Artefact]
    data: Path

    @property
    def url(self) -> str:
        return str(self.api.base_url)

    def here(self, task: str, *, plain: bool = False, **more: Any) -> Evaluation:
        artefact, tokenizer = self.tasks[task], Tokenizer(self.folder)
        adapter = None if plain else load_adapter(artefact, self.model)
        stop_ids = self.model.stop_ids(self.folder) | {tokenizer.eos_id}
        return evaluate(self.model, tokenizer, artefact.record, adapter, self.data, stop_ids=stop_ids, **more)

    def there(self, task: str | None, **more: Any) -> Evaluation:
        return evaluate_served(self.url, task, self.data, concurrency=16, **more)


@pytest.fixture(scope="module")
def serving(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Serving]:
    root, folder, model = tmp_path_factory.mktemp("served"), tiny_model("llama"), load_tiny("llama")
    tasks = {
        name: random_artefact(
            root / "adapters" / name,
            model,
            seed=3,
            template="{prompt}",
            end_token="END",
            generation=generation,
        )
        for name, generation in TASKS.items()
    }
    named: dict[str, Any] = {"task_tokens": ("<|a|>", "<|b|>"), "template": "<|a|> {prompt} <|b|>"}
    tasks[TOKENS] = random_artefact(root / "adapters" / TOKENS, model, seed=4, **named)
    with running_stack(folder, root / "adapters", root) as stack:
        yield Serving(stack.api, model, folder, tasks, data)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("max_tokens", [None, 5])
def test_a_server_scores_as_the_folder_does(task: str, max_tokens: int | None, serving: Serving) -> None:
    here = serving.here(task, max_tokens=max_tokens)
    assert serving.there(task, max_tokens=max_tokens) == here
    assert len(set(here.answers)) > 10
    longest = max(len(answer.split()) for answer in here.answers)
    assert longest == (max_tokens or TASKS[task].max_tokens or 64)


def test_task_tokens_are_not_cut_off_unsaid(serving: Serving) -> None:
    """A folder shortens the text between them, the server would keep the last tokens of whichever kind."""
    assert serving.there(TOKENS, limit=40) == serving.here(TOKENS, limit=40)
    with pytest.raises(ServerError, match="answers 400: the context holds 512 tokens"):
        serving.there(TOKENS)


def test_beams_are_the_folders(serving: Serving) -> None:
    searched = serving.here("toy", beams=3)
    assert serving.there("toy", beams=3) == searched
    assert searched.answers != serving.here("toy").answers, "beams find what greedy does not"
    penalised = serving.here("toy", beams=3, length_penalty=-1.0)
    assert serving.there("toy", beams=3, length_penalty=-1.0) == penalised
    assert penalised.answers != searched.answers
    body = {"task": "toy", "prompt": [*range(40)], "use_beam_search": True, "best_of": 2}
    asked = [serving.api.post("/v1/completions", json=body).json() for _ in range(2)]
    assert asked[0]["choices"] == asked[1]["choices"]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in asked]
    assert cached == [0, 32], "the prompt's full blocks, once"


def test_the_plain_model_is_asked_without_a_task(serving: Serving) -> None:
    """Whose answers are compared with the data as they are: it knows no end token."""
    there = serving.there(None)
    assert there.answers == serving.here("saying-nothing", plain=True).answers
    assert max(len(answer.split()) for answer in there.answers) > 16, "more than the API's default"
    assert there.scores != serving.here("saying-nothing", plain=True).scores, "the end token matters"
    with pytest.raises(ServerError, match="llama is the plain model: it is asked where no task is named"):
        serving.there("llama")


def test_the_command_asks_as_it_is_told(serving: Serving) -> None:
    flags = ["--data", str(serving.data), "--limit", "5", "--max-tokens", "5", "--show", "5"]
    model = ["--model", str(serving.folder), "--dtype", "float32", "--no-plain"]
    served = CliRunner().invoke(app, ["eval", "--url", f"{serving.url}/v1/", "--task", "toy", *flags])
    here = CliRunner().invoke(app, ["eval", "--adapter", str(serving.tasks["toy"].folder), *model, *flags])
    answers = [ended.stdout.splitlines()[1:] for ended in (served, here)]
    assert answers[0] == answers[1], served.output + here.output
    assert max(len(answer.split()) for answer in answers[0]) == 5
    counted = CliRunner().invoke(app, ["eval", "--url", serving.url, "--task", "toy", *flags, "--json"])
    assert json.loads(counted.stdout)["toy"]["examples"] == 5


def test_what_the_server_refuses_is_told(serving: Serving) -> None:
    with pytest.raises(ServerError, match=r"answers 404: .*nothing"):
        serving.there("nothing")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://x", ""])
def test_what_is_no_address_is_told_how_one_looks(url: str, data: Path) -> None:
    with pytest.raises(ServerError, match=r"expected a server.s address like http://127\.0\.0\.1:8000, got"):
        evaluate_served(url, "toy", data)


def test_a_server_that_is_not_there_is_named(data: Path, unused_tcp_port: int) -> None:
    port = unused_tcp_port
    with pytest.raises(ServerError, match=f"no answer from http://127.0.0.1:{port}"):
        evaluate_served(f"http://127.0.0.1:{port}", "toy", data, concurrency=2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give either --adapter or --url"),
        (["--url", "http://x", "--adapter", "."], "give either --adapter or --url"),
        (["--adapter", ".", "--task", "toy"], "needs --url"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags: list[str], says: str, data: Path) -> None:
    ended = CliRunner().invoke(app, ["eval", "--data", str(data), *flags])
    assert ended.exit_code == 2
    assert says in ended.stderr
