"""Data files: what is read, and that a bad line is named by file and number; ids as serving computes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prad.artefact import AdapterRecord, BaseModelRef
from prad.lm import DEFAULT_MODEL, Tokenizer, resolve_model
from prad.training.data import (
    DataError,
    Example,
    TokenisedExample,
    collate,
    prompt_ids,
    read_examples,
    tokenise,
    without_end,
)
from prefill_service.api import ApiLimits
from prefill_service.api.text import PromptEncoder
from tests.cache import CACHE

GOOD = '{"prompt": "a film", "completion": "positive"}'
RECORD = AdapterRecord(
    method="prad-pa", config={}, base=BaseModelRef(name="m", architecture="a", weights="w")
)
TEXTS = [
    "name[The Eagle], eatType[coffee shop], priceRange[less than £20], near[Burger King]",
    "a gripping , beautifully acted film",
    "in  1999   there were  3 films",
    " a space in front and one behind ",
    "tabs\tand\nnew\n\nlines",
    "naïve café — 漢字 🎉👩‍👩‍👧",
    "#OUTPUT: {prompt} <|im_end|> inside",
    "7",
]


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "x", ', "line: "),
        ("not json", "line: "),
        ("[1]", "line: "),
        ('{"prompt": "x"}', "completion: Field required"),
        ('{"completion": "x"}', "prompt: Field required"),
        ('{"prompt": 3, "completion": "x"}', "prompt: Input should be a valid string"),
        ('{"prompt": "x", "completion": null}', "completion: Input should be a valid string"),
        ('{"prompt": "", "completion": "x"}', "prompt: String should have at least 1 character"),
        ('{"prompt": "x", "completion": "y", "references": "y"}', "references: "),
        (b'{"prompt": "\xff", "completion": "y"}', "line: "),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:3: ")
    assert complaint in said
    assert "\n" not in said


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read {tmp_path / 'none'}: No such file"):
        read_examples(tmp_path / "none")
    (tmp_path / "empty").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=f"{tmp_path / 'empty'} holds no examples"):
        read_examples(tmp_path / "empty")
    with pytest.raises(DataError, match=f"cannot read {tmp_path}"):
        read_examples(tmp_path)


def test_every_line_is_read_whatever_its_text_holds(tmp_path: Path) -> None:
    r"""Unicode knows many line ends; in JSONL only \n is one."""
    texts = [*TEXTS, "a\u2028b", "a\x85b", "a\x1eb\x0bc", "\r"]
    lines = [json.dumps({"prompt": t, "completion": t, "other": 1}, ensure_ascii=False) for t in texts]
    path = tmp_path / "train.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    examples = read_examples(path)
    assert [e.prompt for e in examples] == [e.completion for e in examples] == texts
    assert [e.prompt for e in read_examples(path, limit=3)] == texts[:3]


@pytest.mark.parametrize(
    ("before", "between", "end"),
    [
        (b"\xef\xbb\xbf", b"\n", b"\n"),
        (b"\xef\xbb\xbf", b"\r\n", b"\r\n\r\n"),
        (b"\n", b"\n  \n\t\n", b"\n\n"),
        (b"", b"\n\xef\xbb\xbf", b""),  # two files put together
    ],
)
def test_what_editors_put_around_lines_is_no_example(
    before: bytes, between: bytes, end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(before + GOOD.encode() + between + GOOD.encode() + end)
    assert len(read_examples(path)) == 2
    assert read_examples(path, limit=2) == read_examples(path)
    assert len(read_examples(path, limit=1)) == 1


def test_a_bad_line_behind_blank_ones_keeps_its_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":4: "):
        read_examples(write(tmp_path / "f", "", GOOD, "", "junk"))


def test_a_line_behind_the_limit_is_not_looked_at(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path / "f", GOOD, GOOD, "junk"), limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [("good<|end|>", "good"), ("good <|end|>\n", "good"), ("good", "good"), ("good ", "good "), ("", "")],
)
def test_answers_end_at_the_end_token(text: str, answer: str) -> None:
    given = Example(prompt="x<|end|>", completion=text, references=[text, "fine"])
    (ended,) = without_end([given], "<|end|>")
    assert ended == Example(prompt="x<|end|>", completion=answer, references=[answer, "fine"])
    assert without_end([given], None) == [given]
    (alone,) = without_end([Example(prompt="x", completion=text)], "<|end|>")
    assert alone.answers == [answer]


def test_the_completion_is_the_first_of_the_right_answers() -> None:
    assert Example(prompt="x", completion="a", references=["b", "a", "c"]).answers == ["a", "b", "c"]


@pytest.mark.parametrize("fields", [{"completion": "good<|end|> bad"}, {"references": ["good<|end|> bad"]}])
def test_nothing_goes_on_behind_the_end_token(fields: dict[str, Any]) -> None:
    example = Example.model_validate({"prompt": "x", "completion": "good", **fields})
    with pytest.raises(DataError, match=r"example 1: the answer goes on behind <\|end\|>"):
        without_end([example], "<|end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_model(DEFAULT_MODEL, CACHE))


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("template", ["#INPUT: {prompt} #OUTPUT:", "{prompt}", "Review ({prompt}):\n"])
async def test_training_sees_the_prompt_ids_that_serving_computes(
    template: str, chat_template: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = RECORD.model_copy(update={"template": template, "chat_template": chat_template})
    lines = [json.dumps({"prompt": t, "completion": "x"}) for t in TEXTS]
    examples = read_examples(write(tmp_path / "train.jsonl", *lines))
    trained = tokenise(examples, tokenizer, record, context=512)
    for thread_chars in (0, 10_000):
        serving = PromptEncoder(tokenizer, len(tokenizer), 512, ApiLimits(thread_chars=thread_chars))
        for text, example in zip(TEXTS, trained, strict=True):
            assert [example.prompt] == await serving.completion(record, [text], "task", cut=False)
    (raw,) = await serving.completion(record, TEXTS[:1], "none", cut=False)
    assert trained[0].prompt != raw or (template == "{prompt}" and not chat_template)


def test_a_chat_template_that_the_model_lacks_is_told(tiny_model: Callable[[str], Path]) -> None:
    record = RECORD.model_copy(update={"chat_template": True})
    with pytest.raises(DataError, match="trained on a chat template, and this model has none"):
        prompt_ids("x", Tokenizer(tiny_model("llama")), record, 10)


def test_what_is_learnt_decodes_to_what_serving_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """completion = " " + text + EOS, tokenised alone; the answer is the decoded text without that space."""
    lines = [json.dumps({"prompt": "x", "completion": t}) for t in TEXTS]
    examples = read_examples(write(tmp_path / "train.jsonl", *lines))
    for text, example in zip(TEXTS, tokenise(examples, tokenizer, RECORD, context=8192), strict=True):
        *ids, end = example.completion
        assert end == tokenizer.eos_id
        assert tokenizer.decode(ids) == " " + text


def test_long_prompts_keep_their_end_and_long_completions_their_beginning(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    examples = read_examples(
        write(tmp_path / "f", json.dumps({"prompt": "word " * 50, "completion": "c " * 50}))
    )
    (whole,) = tokenise(examples, tokenizer, RECORD, context=8192)
    (cut,) = tokenise(examples, tokenizer, RECORD, context=512, max_prompt=10, max_completion=7)
    assert not whole.cut
    assert cut == TokenisedExample(whole.prompt[-10:], whole.completion[:7], cut=True)
    (fitting,) = tokenise(examples, tokenizer, RECORD, context=len(whole.completion) + 9)
    assert fitting == TokenisedExample(whole.prompt[-9:], whole.completion, cut=True)
    with pytest.raises(DataError, match=r"example 1: a completion of .* no room for a prompt"):
        tokenise(examples, tokenizer, RECORD, context=20)


def test_collating_packs_end_to_end() -> None:
    batch = collate([TokenisedExample((1, 2, 3), (4, 9)), TokenisedExample((5,), (6, 7, 9))])
    assert batch["ids"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch["lengths"].tolist() == [4, 3]
    assert batch["prompt_lengths"].tolist() == [3, 1]
    assert batch["label_rows"].tolist() == [2, 3, 4, 5, 6]
    assert batch["labels"].tolist() == [4, 9, 6, 7, 9]
