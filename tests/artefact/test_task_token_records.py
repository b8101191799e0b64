"""Task tokens in `prad.json`: where they may stand, what they may be called, and how a template is cut."""

from typing import Any

import pytest
from pydantic import ValidationError

from prad.artefact import FULL, AdapterRecord, BaseModelRef, task_token_id

BASE = BaseModelRef(name="tiny", architecture="llama layers=2", weights="ab" * 32)
TOPIC, ANSWER = "<|topic|>", "<|answer|>"


def record(**fields: Any) -> AdapterRecord:
    given = {"method": "prad-pa", "config": {}, "base": BASE, "task_tokens": (TOPIC, ANSWER)}
    return AdapterRecord(**given | {"template": f"{TOPIC}Q: {{prompt}} {{x}}{ANSWER}{TOPIC} A:"} | fields)


def test_the_template_is_cut_at_them() -> None:
    one, two = task_token_id(0), task_token_id(1)
    assert (one, two, task_token_id(one), task_token_id(two)) == (-1, -2, 0, 1)
    assert record().parts("a film") == ("", one, "Q: a film {x}", two, "", one, " A:")
    assert record(task_tokens=(ANSWER, TOPIC)).parts("?")[1] == two, "rows are in the record's order"


@pytest.mark.parametrize("prompt", [TOPIC, f"a {ANSWER}{TOPIC} b", "{prompt}", "<|topic", ""])
def test_a_prompt_cannot_bring_its_own(prompt: str) -> None:
    parts = record().parts(prompt)
    assert parts[2] == f"Q: {prompt} {{x}}"
    assert sum(isinstance(part, int) for part in parts) == 3
    assert record(template="{prompt}", task_tokens=()).parts(prompt) == (prompt,)
    split = record(template="<|to{prompt}pic|>" + TOPIC + ANSWER)
    assert split.parts("")[0] == TOPIC, "what prompt and template make together is text as well"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_tokens": ("topic",)}, "called like <|sentiment|>, got 'topic'"),
        ({"task_tokens": ("<|a b|>",)}, "called like <|sentiment|>"),
        ({"task_tokens": ("<|{prompt}|>",)}, "called like <|sentiment|>"),
        ({"task_tokens": ("<||>",)}, "called like <|sentiment|>"),
        ({"task_tokens": (TOPIC, ANSWER, TOPIC)}, "<|topic|> is named twice"),
        ({"task_tokens": (TOPIC, "<|other|>")}, "the template does not use <|other|>: '<|topic|>Q:"),
        ({"chat_template": True}, "no place for task tokens"),
        ({"method": FULL}, "a fully fine-tuned model has embeddings of its own"),
        ({"end_token": ""}, "an end token is a text"),
        ({"end_token": ANSWER}, "the end token '<|answer|>' ends answers and has no embedding"),
        ({"end_token": "Q:"}, "the template cannot use it"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        record(**fields)
    (problem,) = caught.value.errors()
    assert message in problem["msg"]


@pytest.mark.parametrize("text", ["END", "<|im_end|>", "</s>", "\n\n"])
def test_any_other_text_may_end_answers(text: str) -> None:
    assert record(end_token=text).end_token == text
