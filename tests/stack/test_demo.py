"""`prad serve` with the real model and the demo adapters, as a person starts it: real answers, in bf16.

bf16 rounds otherwise than float32, so texts cannot be compared with the reference's: instead every
served token is teacher-forced through the float32 reference, and its logit must be close to the maximum.
With itself the server must agree to the bit, whoever shares a request's passes and steps.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.artefact import read_artefact
from prad.lm import DEFAULT_MODEL, Tokenizer, resolve_model
from tests.cache import CACHE
from tests.oracle.reference import Reference

BF16_TOLERANCE = 0.5
"""Logits: how far below the reference's maximum a served token may lie."""

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "examples" / "adapters"
EAGLE = "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], near[Burger King]"
PROMPTS = [
    ("e2e", EAGLE),
    ("e2e", "name[Blue Spice], eatType[pub], customer rating[average], area[riverside]"),
    ("sentiment", "a gripping , beautifully acted film"),
    ("sentiment", "a dull , lifeless mess that wastes its cast"),
    ("tweet-sentiment", "wow what a lovely sunny day, I am so happy :)"),
]


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Callable[[], int]
) -> Iterator[httpx.Client]:
    """The command itself; what it prints is checked before anything is asked."""
    port, registry, decode, metrics = (unused_tcp_port_factory() for _ in range(4))
    command = [sys.executable, "-m", "prad_cli", "serve", "--adapters", str(ADAPTERS)]
    ports = ["--port", str(port), "--registry-port", str(registry), "--decode-port", str(decode)]
    ports += ["--decode-metrics-port", str(metrics)]
    data = ["--data-dir", str(tmp_path_factory.mktemp("demo"))]
    process = subprocess.Popen([*command, *ports, *data], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stderr is not None
    said = ""
    while "Ctrl-C" not in said:
        line = process.stderr.readline()
        assert line, f"prad serve ended: {said}"
        said += line
    assert f"curl http://127.0.0.1:{port}/v1/completions" in said
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(resolve_model(DEFAULT_MODEL, CACHE))


def ask(api: httpx.Client, task: str | None, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, **({"task": task} if task else {}), **more}
    response = api.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text[:300]
    return response.json()  # type: ignore[no-any-return]


def test_every_demo_adapter_is_listed(api: httpx.Client) -> None:
    listed = {model["id"]: model["parent"] for model in api.get("/v1/models").json()["data"]}
    assert listed == {DEFAULT_MODEL: None} | {path.name: DEFAULT_MODEL for path in ADAPTERS.iterdir()}


def test_the_tasks_answer(api: httpx.Client) -> None:
    assert ask(api, "sentiment", PROMPTS[2][1])["choices"][0]["text"] == "positive"
    assert ask(api, "sentiment", PROMPTS[3][1])["choices"][0]["text"] == "negative"
    answer = ask(api, "e2e", EAGLE)
    assert "The Eagle" in answer["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["prad"]["digest"] == read_artefact(ADAPTERS / "e2e").digest


def test_a_stream_says_the_same(api: httpx.Client) -> None:
    whole = ask(api, "sentiment", PROMPTS[2][1])["choices"][0]["text"]
    body = {"task": "sentiment", "prompt": PROMPTS[2][1], "stream": True}
    with api.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]) == whole


def examples(page: str, kind: str) -> list[str]:
    """What a page shows as code of a kind."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_first_pages_examples_say_what_they_say(
    api: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked,) = examples("quickstart", "python")
    exec(asked.replace("http://localhost:8000", str(api.base_url).rstrip("/")), {})
    assert capsys.readouterr().out == "positive\n"
    monkeypatch.chdir(ROOT)
    whole, parts, _ = examples("python", "python")
    exec(whole + parts, {})
    assert capsys.readouterr().out == "['positive', 'negative']\n['positive']\n"
    (shell,) = (each for each in examples("quickstart", "sh") if "curl" in each)
    body = json.loads(shell.partition("-d '")[2].rpartition("'")[0])
    with api.stream("POST", "/v1/completions", json=body) as response:
        assert "data: [DONE]" in list(response.iter_lines())


def test_chat_with_a_task_and_with_the_plain_model(api: httpx.Client) -> None:
    def chat(**body: Any) -> str:
        response = api.post("/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": 24})
        assert response.status_code == 200, response.text[:300]
        return str(response.json()["choices"][0]["message"]["content"])

    message = [{"role": "user", "content": PROMPTS[2][1]}]
    assert chat(model="sentiment", messages=message) == "positive"
    capital = [{"role": "user", "content": "What is the capital of Japan?"}]  # no step of it is a near tie
    assert "Tokyo" in chat(messages=capital)


def test_an_answer_goes_on_without_the_adapter(api: httpx.Client, reference: Reference) -> None:
    """Its tokens are those that follow the prompt with the adapter and the given text without."""
    tokenizer, artefact = Tokenizer(resolve_model(DEFAULT_MODEL, CACHE)), read_artefact(ADAPTERS / "e2e")
    said = {"role": "assistant", "content": "The Eagle is a coffee"}
    body: dict[str, Any] = {"model": "e2e", "messages": [{"role": "user", "content": EAGLE}, said]}
    body["continue_final_message"] = True
    answer = api.post("/v1/chat/completions", json=body | {"temperature": 0, "return_token_ids": True}).json()
    prompt = tokenizer.encode_prompt(artefact.record.wrap(EAGLE))
    given = tokenizer.encode_continuation(f" {said['content']}")
    assert answer["prompt_token_ids"] == api.post("/tokenize", json=body).json()["tokens"] == prompt + given
    (choice,) = answer["choices"]
    assert choice["message"]["content"].startswith(" shop")
    tokens = choice["token_ids"]
    logits = reference.logits(prompt, [*given, *tokens], artefact.folder)[len(given) :]
    served = logits[range(len(tokens)), tokens]
    assert float((logits.max(dim=-1).values - served).max()) <= BF16_TOLERANCE


def test_the_default_models_template_takes_no_tools(api: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    for more in ({}, {"model": "e2e"}):
        error = api.post("/v1/chat/completions", json={**body, **more}).json()["error"]
        assert (error["code"], error["param"]) == ("tools_not_supported", "tools")


def test_every_served_token_is_near_the_references_best(api: httpx.Client, reference: Reference) -> None:
    tokenizer = Tokenizer(resolve_model(DEFAULT_MODEL, CACHE))
    ids = {tokenizer.token_text(i): i for i in range(len(tokenizer))}
    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # they share prompt passes and decode steps
        answers = list(pool.map(lambda p: ask(api, *p, logprobs=0, max_tokens=40), PROMPTS))
    worst = 0.0
    for (task, prompt), answer in zip(PROMPTS, answers, strict=True):
        artefact = read_artefact(ADAPTERS / task)
        tokens = [ids[text] for text in answer["choices"][0]["logprobs"]["tokens"]]
        prompt_ids = tokenizer.encode_prompt(artefact.record.wrap(prompt))
        logits = reference.logits(prompt_ids, tokens, artefact.folder)
        served = logits[range(len(tokens)), tokens]
        worst = max(worst, float((logits.max(dim=-1).values - served).max()))
    assert worst <= BF16_TOLERANCE


def test_an_answer_is_the_same_alone_in_any_mix_and_from_the_cache(
    api: httpx.Client,
) -> None:
    """Ids and log-probabilities, greedy and drawn; prompts short and in chunks, with a task and without."""
    story = "The history of the small harbour town is long, and most of it was never written down. " * 90
    prompts = [*PROMPTS, (None, "In the year 1905, Albert Einstein"), (None, story + "It was founded in")]
    asked = [
        {
            "task": task,
            "prompt": prompt,
            "max_tokens": 24,
            "logprobs": 3,
            "temperature": temperature,
            "seed": 11,
        }
        for task, prompt in prompts
        for temperature in (0.0, 0.8)
    ]

    def answer(body: dict[str, Any]) -> tuple[Any, Any]:
        found = ask(api, **body)
        return found["choices"][0]["logprobs"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    def salted(salt: str) -> list[dict[str, Any]]:
        return [body | {"cache_salt": salt} for body in asked]

    alone = [answer(body) for body in salted("alone")]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, [*salted("mix"), *salted("mix")[::-1]]))
    again = [answer(body) for body in salted("alone")]
    expected = [logprobs for logprobs, _ in alone]
    assert [logprobs for logprobs, _ in together] == expected + expected[::-1]
    assert [logprobs for logprobs, _ in again] == expected
    assert alone[-2][1] == 0 < again[-1][1], "the last one's prompt comes from the cache"
