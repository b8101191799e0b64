"""The float32 oracle once more, with the real model and the demo adapters instead of tiny random ones."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prad.artefact import read_artefact
from prad.lm import DEFAULT_MODEL, Tokenizer, resolve_model
from tests.cache import CACHE
from tests.conftest import StackMaker
from tests.oracle.comparing import CLEAR, TOLERANCE
from tests.oracle.reference import Reference

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
STEPS = 32
PROMPTS = {
    "e2e": [
        "name[The Eagle], eatType[coffee shop], food[Japanese], near[Burger King]",
        "name[Zizzi], eatType[pub], customer rating[5 out of 5], area[riverside], familyFriendly[yes]",
    ],
    "sentiment": ["a gripping , beautifully acted film", "two hours that feel like ten"],
    "tweet-sentiment": ["stuck in traffic again, what a terrible start of the day"],
}


@pytest.mark.long
def test_the_stack_equals_the_reference(tmp_path: Path, running_stack: StackMaker) -> None:
    folder = resolve_model(DEFAULT_MODEL, CACHE)
    tokenizer, reference = Tokenizer(folder), Reference(folder)
    texts = [tokenizer.token_text(i) for i in range(len(tokenizer))]
    ids = {text: i for i, text in enumerate(texts)}
    unclear = {text for i, text in enumerate(texts) if ids[text] != i}  # parts of characters
    asked = [(task, prompt) for task, prompts in PROMPTS.items() for prompt in prompts]
    with running_stack(folder, ADAPTERS, tmp_path) as running:

        def ask(task: str, prompt: str) -> dict[str, list[object]]:
            body = {"task": task, "prompt": prompt, "max_tokens": STEPS, "ignore_eos": True, "logprobs": 20}
            response = running.api.post("/v1/completions", json=body, timeout=300)
            assert response.status_code == 200, response.text[:300]
            return response.json()["choices"][0]["logprobs"]  # type: ignore[no-any-return]

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda a: ask(*a), asked))
    compared = 0
    for (task, prompt), answer in zip(asked, answers, strict=True):
        artefact = read_artefact(ADAPTERS / task)
        tokens = [ids[str(text)] for text in answer["tokens"]]
        prompt_ids = tokenizer.encode_prompt(artefact.record.wrap(prompt))
        logits = reference.logits(prompt_ids, tokens, artefact.folder)
        for step, top in enumerate(answer["top_logprobs"]):
            assert isinstance(top, dict)
            scale = float(logits[step].max() - logits[step].min())
            expected = logits[step].log_softmax(-1)
            for text, logprob in top.items():
                if text not in unclear:
                    assert abs(float(expected[ids[text]]) - logprob) <= TOLERANCE * scale
                    compared += 1
            best = logits[step].topk(2).values
            if float(best[0] - best[1]) > CLEAR * scale:
                assert tokens[step] == int(logits[step].argmax())
    assert compared > 15 * STEPS * len(asked)
