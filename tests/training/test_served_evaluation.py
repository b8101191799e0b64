"""`prad eval` through a running server gives what it gives in this process, and says what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prad.adapters import load_adapter
from prad.artefact import GenerationDefaults
from prad.cli.app import app
from prad.lm import LanguageModel, Tokenizer
from prad.training.evaluate import evaluate
from prad.training.served import ServerError, evaluate_served
from tests.conftest import free_ports, random_artefact, running_stack


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """With an end token."""
    lines = [json.dumps({"prompt": f"t{i} t{2 * i} t3", "completion": f"t{i} t5 END"}) for i in range(40)]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_server_scores_as_the_folder_does(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    folder, model = tiny_model("llama"), load_tiny("llama")
    tokenizer = Tokenizer(folder)
    artefact = random_artefact(
        tmp_path / "adapters" / "toy",
        model,
        seed=3,
        template="{prompt}",
        end_token="END",
        generation=GenerationDefaults(temperature=0.0, max_tokens=36),
    )
    stop_ids = model.stop_ids(folder) | {tokenizer.eos_id}
    here = evaluate(model, tokenizer, artefact.record, load_adapter(artefact, model), data, stop_ids=stop_ids)
    assert len(set(here.answers)) > 10
    root = tmp_path / "root"
    root.mkdir()
    with running_stack(folder, tmp_path / "adapters", root) as stack:
        url = str(stack.api.base_url)
        assert evaluate_served(url, "toy", data, concurrency=16) == here
        searched = evaluate(
            model, tokenizer, artefact.record, load_adapter(artefact, model), data, stop_ids=stop_ids, beams=3
        )
        assert evaluate_served(url, "toy", data, beams=3, concurrency=8) == searched
        assert searched.answers != here.answers, "beams find what greedy does not"
        body = {"task": "toy", "prompt": [*range(40)], "use_beam_search": True, "best_of": 2}
        asked = [stack.api.post("/v1/completions", json=body).json() for _ in range(2)]
        assert asked[0]["choices"] == asked[1]["choices"]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in asked]
        assert cached == [0, 32], "the prompt's full blocks, once"
        with_end = artefact.record.model_copy(update={"end_token": None})
        other = evaluate(model, tokenizer, with_end, load_adapter(artefact, model), data, stop_ids=stop_ids)
        assert other.scores != here.scores, "it matters that the end token is left out"
        flags = ["--url", url, "--task", "toy", "--data", str(data), "--limit", "5", "--json"]
        shown = CliRunner().invoke(app, ["eval", *flags])
        assert json.loads(shown.stdout)["toy"]["examples"] == 5
        with pytest.raises(ServerError, match=r"answers 404: .*nothing"):
            evaluate_served(url, "nothing", data)
        brief = evaluate(
            model,
            tokenizer,
            artefact.record,
            load_adapter(artefact, model),
            data,
            stop_ids=stop_ids,
            max_tokens=5,
        )
        assert evaluate_served(f"{url}/v1/", "toy", data, max_tokens=5) == brief
        assert brief.answers != here.answers
        bare = artefact.record.model_copy(update={"generation": GenerationDefaults(), "end_token": None})
        plain = evaluate(model, tokenizer, bare, None, data, stop_ids=stop_ids)
        assert evaluate_served(url, None, data) == plain
        assert max(len(answer.split()) for answer in plain.answers) > 16, "more than the API's default"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://x", ""])
def test_what_is_no_address_is_told_how_one_looks(url: str, data: Path) -> None:
    with pytest.raises(ServerError, match=r"expected a server.s address like http://127\.0\.0\.1:8000, got"):
        evaluate_served(url, "toy", data)


def test_a_server_that_is_not_there_is_named(data: Path) -> None:
    (port,) = free_ports(1)
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
