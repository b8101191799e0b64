"""lm-eval and guidellm as their users run them, against the running stack: they report what was served; and
schemathesis, which sends whatever our documents allow, and more, and compares the answers with them."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from local_stack.stack import Stack, answers
from prad.adapters import load_adapter
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import TokenisedExample, prompt_ids
from prad.training.likelihood import scored
from tests.conftest import random_artefact
from tests.outside.asking import LARGE, Outside
from tests.outside.clients import command, folder

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PROMPTS = Path(__file__).parent / "data" / "prompts.txt"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
TASK = """\
task: prompts_of_ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 12, temperature: 0, do_sample: false, raw_prompt: true}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def run(arguments: list[str], tmp_path: Path, **environment: str) -> str:
    """Without the network: tokenizer and data come from folders. Fails with what the program said."""
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "TRANSFORMERS_OFFLINE": "1"}
    ended = subprocess.run(
        arguments,
        cwd=tmp_path,
        env=os.environ | away | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


@pytest.mark.parametrize("ids", [False, True], ids=["text", "ids"])
def test_lm_eval_scores_what_was_served(
    outside: Outside, reading_model: Path, tmp_path: Path, ids: bool
) -> None:
    """All answers right where the right ones are what the API says, and fewer where one is not."""
    program = command("lm-eval")
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    body = {"task": "red", "raw_prompt": True, "stop": ["~"], "ignore_eos": False}
    lines = [{"prompt": p, "completion": outside.text(prompt=p, **body)} for p in prompts]
    lines[0]["completion"] += " and more"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "prompts_of_ours.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    url = f"{outside.stack.api.base_url}/v1/completions"
    model = f"model=red,base_url={url},tokenizer={reading_model},tokenizer_backend=huggingface"
    model += f",tokenized_requests={ids},max_length=512,num_concurrent=4"
    arguments = ["--model", "local-completions", "--model_args", model, "--tasks", "prompts_of_ours"]
    run([program, *arguments, "--include_path", str(tmp_path), "--output_path", "out"], tmp_path)
    (found,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(found.read_text(encoding="utf-8"))["results"]["prompts_of_ours"]
    assert scores["exact_match,none"] == pytest.approx(1 - 1 / len(prompts))


CHOICES = """\
task: answers_of_ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: answers
doc_to_target: right
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ANSWERS = ("yes", "no way", "Perhaps, perhaps not.")


@pytest.mark.parametrize(
    ("kind", "task"),
    [("prad", "red"), ("prad", None), ("local-completions", None), ("local-completions", "red")],
)
def test_lm_eval_scores_given_answers_as_this_process_does(
    outside: Outside,
    load_reading: LanguageModel,
    reading_model: Path,
    tmp_path: Path,
    kind: str,
    task: str | None,
) -> None:
    """A task through our model of lm-eval; the plain model through its own as well, and a task that the whole
    text is a prompt of, which is another number."""
    program = [command("lm-eval")]
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    expected = _likelihoods(load_reading, reading_model, tmp_path / "red", prompts, adapted=task is not None)
    right = [max(range(len(ANSWERS)), key=totals.__getitem__) for totals in expected]
    right[0] = (right[0] + 1) % len(ANSWERS)
    lines = [{"prompt": p, "answers": ANSWERS, "right": r} for p, r in zip(prompts, right, strict=True)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "answers_of_ours.yaml").write_text(CHOICES.format(data=data), encoding="utf-8")
    url = str(outside.stack.api.base_url)
    if kind == "prad":
        model = f"base_url={url},num_concurrent=2" + ("" if task is None else f",task={task}")
    else:
        base = outside.stack.api.get("/v1/models").json()["data"][0]["id"]
        model = f"model={task or base},base_url={url}/v1/completions,tokenizer={reading_model}"
        model += f",tokenizer_backend=huggingface,tokenized_requests={task is None},max_length=512"
    if kind == "prad":
        program = [str(folder("lm-eval") / "bin" / "python"), "-m", "prad.harness"]
    arguments = [
        "--model",
        kind,
        "--model_args",
        model,
        "--tasks",
        "answers_of_ours",
        "--include_path",
        str(tmp_path),
    ]
    arguments += ["--batch_size", "8" if kind == "prad" else "1", "--output_path", "out", "--log_samples"]
    if (kind, task) == ("local-completions", "red"):
        with pytest.raises(AssertionError, match="stands in this task's template"):
            run([*program, *arguments], tmp_path, PYTHONPATH=str(ROOT))
        return
    run([*program, *arguments], tmp_path, PYTHONPATH=str(ROOT))
    (found,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    samples.sort(key=lambda sample: int(sample["doc_id"]))
    for sample, totals in zip(samples, expected, strict=True):
        scored = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert scored == pytest.approx(totals, abs=2e-3)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]["answers_of_ours"]
    assert scores["acc,none"] == pytest.approx(1 - 1 / len(prompts))


def _likelihoods(
    made_with: LanguageModel, folder: Path, adapter: Path, prompts: list[str], *, adapted: bool
) -> list[list[float]]:
    """Of each answer behind each prompt, computed here."""
    model, tokenizer = LanguageModel.load(folder, dtype=torch.float32), Tokenizer(folder)
    artefact = random_artefact(adapter, made_with, 1, r=LARGE)  # the stack's red
    own = load_adapter(artefact, model)
    if not adapted:
        for parameter in own.parameters.values():
            parameter.zero_()
    examples = []
    for prompt in prompts:
        ids = (
            prompt_ids(prompt, tokenizer, artefact.record, 512)
            if adapted
            else tokenizer.encode_prompt(prompt)
        )
        for answer in ANSWERS:
            behind = tokenizer.encode_continuation(f" {answer}")
            examples.append(TokenisedExample(tuple(ids), tuple(behind)))
    totals = [likelihood.total for likelihood in scored(model, own, examples)]
    return [totals[at : at + len(ANSWERS)] for at in range(0, len(totals), len(ANSWERS))]


@pytest.mark.parametrize(
    ("data", "endpoint"),
    [("synthetic", "completions"), ("file", "completions"), ("synthetic", "chat/completions")],
)
def test_guidellm_measures_every_request(
    outside: Outside, reading_model: Path, tmp_path: Path, data: str, endpoint: str
) -> None:
    program = command("guidellm")
    backend = f"kind=openai_http,target={outside.stack.api.base_url},model=red"
    backend += f",request_format=/v1/{endpoint}"
    source = "kind=synthetic_text,prompt_tokens=40,output_tokens=8"
    if data == "file":
        source = f"kind=json_file,path={_prompts_as_json(tmp_path)}"
    arguments = ["--backend", backend, "--profile", "kind=concurrent,streams=2", "--data", source]
    arguments += ["--constraint", "kind=max_requests,count=6", "--output", "kind=json,path=report.json"]
    arguments += ["--tokenizer", f"kind=huggingface_auto,model={reading_model}", "--disable-progress"]
    run([program, "run", *arguments], tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (measured,) = report["benchmarks"]
    requests = measured["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (6, 0)
    if data == "synthetic":
        assert {r["output_metrics"]["text_tokens"] for r in requests["successful"]} == {8}


@pytest.fixture
def impatient_registry(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> Iterator[str]:
    """One of its own: whatever is found in its documents is pushed, changed and deleted there."""
    port = unused_tcp_port_factory()
    where = ["--port", str(port), "--data-dir", str(tmp_path / "data")]
    where += ["--max-wait-seconds", "0.05", "--replicas-wait-seconds", "0"]
    with Stack(tmp_path / "logs") as stack:
        stack.start("registry", where)
        stack.wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), "the registry")
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("service", ["api", "registry"])
def test_schemathesis_finds_no_answer_that_the_documents_do_not_have(
    outside: Outside, impatient_registry: str, tmp_path: Path, service: str
) -> None:
    url = impatient_registry if service == "registry" else str(outside.stack.api.base_url)
    arguments = ["run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", "40", "--seed", "1"]
    arguments += ["--exclude-path", "/v1/events/stream"]  # which has no end, and its reader no time-out
    run([command("schemathesis"), *arguments], tmp_path)


def _prompts_as_json(tmp_path: Path) -> Path:
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    return path
