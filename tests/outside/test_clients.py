"""lm-eval and guidellm as their users run them, against the running stack: they report what was served; and
schemathesis, which sends whatever our documents allow, and more, and compares the answers with them."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_stack.stack import Stack, answers
from tests.outside.asking import Outside
from tests.outside.clients import command

pytestmark = pytest.mark.long

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


def run(arguments: list[str], tmp_path: Path) -> str:
    """Without the network: tokenizer and data come from folders. Fails with what the program said."""
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "TRANSFORMERS_OFFLINE": "1"}
    ended = subprocess.run(
        arguments,
        cwd=tmp_path,
        env=os.environ | away,
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


@pytest.mark.parametrize("data", ["synthetic", "file"])
def test_guidellm_measures_every_request(
    outside: Outside, reading_model: Path, tmp_path: Path, data: str
) -> None:
    program = command("guidellm")
    backend = f"kind=openai_http,target={outside.stack.api.base_url},model=red,request_format=/v1/completions"
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
        stack.wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60, "the registry")
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("service", ["api", "registry"])
def test_schemathesis_finds_no_answer_that_the_documents_do_not_have(
    outside: Outside, impatient_registry: str, tmp_path: Path, service: str
) -> None:
    url = impatient_registry if service == "registry" else str(outside.stack.api.base_url)
    arguments = ["run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", "40", "--seed", "1"]
    run([command("schemathesis"), *arguments], tmp_path)


def _prompts_as_json(tmp_path: Path) -> Path:
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    return path
