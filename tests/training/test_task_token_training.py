"""Task tokens in training: their embeddings are learned beside the method's parameters, the base stays as it
is, and the end token is the base's EOS."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from typer.testing import CliRunner

from prad.adapters import AdapterError, first_embeddings, load_adapter
from prad.artefact import WEIGHTS, AdapterRecord, BaseModelRef, GenerationDefaults, read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError, Example, collate, read_examples, tokenise
from prad.training.decoding import Decoding
from prad.training.evaluate import evaluate
from prad.training.objective import AdapterTuning
from prad.training.train import train
from prad_cli.app import app
from tests.conftest import EOS, random_artefact
from tests.training.toy import frozen_digest, settings

END = "</s>"  # the model's own EOS
TOKENS = {
    "template": "<|topic|> {prompt} <|answer|>",
    "task_tokens": {"<|topic|>": "t7 t8", "<|answer|>": None},
    "end_token": END,
}
RECORD = AdapterRecord(
    method="prad-pa",
    config={},
    base=BaseModelRef(name="", architecture="", weights=""),
    template="t1 <|topic|> {prompt} <|answer|>",
    task_tokens=("<|answer|>", "<|topic|>"),
    end_token=END,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether a prompt ends in t1 or t2; what looks like a task token there is a word like others."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 128), ("validation", 32)):
        lines = [
            {"prompt": f"t{3 + i % 30} <|topic|> t{1 + i % 2}", "completion": f"t{50 + 10 * (i % 2)} {END}"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_they_are_learned_and_the_base_stays(
    family: str,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    """Gemma 3's embeddings are its head as well. Answers are one token long: what follows, the random plain
    model decides."""
    model, tokenizer = load_tiny(family), Tokenizer(tiny_model(family))
    assert model.config.tie_word_embeddings == (family == "gemma3")
    before = frozen_digest(model)
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=80, max_tokens=1, **TOKENS))
    assert frozen_digest(model) == before
    assert not any(p.requires_grad for p in model.module.parameters())

    artefact = read_artefact(tmp_path)
    assert artefact.record == record
    assert (record.task_tokens, record.end_token) == (("<|topic|>", "<|answer|>"), END)
    stored = load_file(tmp_path / WEIGHTS)
    assert record.training["parameters"] == sum(tensor.numel() for tensor in stored.values())
    moved = stored["input.task_tokens"] - first_embeddings(["t7 t8", None], tokenizer, model)
    assert (moved.abs().mean(dim=1) > 1e-3).all()

    adapter = load_adapter(artefact, model)
    examples = read_examples(data / "validation.jsonl")
    batch = collate(tokenise(examples, tokenizer, record, context=512))
    with torch.no_grad():
        loss = float(AdapterTuning(model, adapter)(**batch)["loss"])
    assert loss == pytest.approx(record.training["validation_loss"], rel=1e-3, abs=1e-4)
    stop = frozenset({tokenizer.eos_id})
    found = evaluate(model, tokenizer, record, adapter, data / "validation.jsonl", stop_ids=stop)
    assert found.scores["exact_match"] > 95, "answers are compared without the end token"
    plain = evaluate(model, tokenizer, record, None, data / "validation.jsonl", stop_ids=stop)
    assert plain.scores["exact_match"] < 60, "the plain model gets no task tokens"


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    more: dict[str, Any] = {"max_steps": 12, "eval_every": 4, "method": "prad-prefix", **TOKENS}
    more["config"] = {"virtual_tokens": 3, "projection": 8}
    train(model, tokenizer, "tiny", settings(data, tmp_path / "whole", **more))
    original = Trainer.evaluate

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "twice"
    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, "tiny", settings(data, out, **more))
    monkeypatch.setattr(Trainer, "evaluate", original)
    other = more | {"task_tokens": {"<|topic|>": "t9", "<|answer|>": None}}
    with pytest.raises(DataError, match="a run with other settings"):
        train(model, tokenizer, "tiny", settings(data, out, resume=True, **other))
    train(model, tokenizer, "tiny", settings(data, out, resume=True, **more))
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_ids_of_an_example(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))

    def ids(completion: str, most: int = 99) -> Any:
        example = Example(prompt="t5 <|topic|> t6", completion=completion)
        (one,) = tokenise([example], tokenizer, RECORD, context=512, max_prompt=most)
        return one

    unknown = 0
    assert ids(f"t9 t8{END}").prompt == (1, -2, 5, unknown, 6, -1)
    assert ids(f"t9 t8{END}").completion == ids("t9 t8").completion == (9, 8, EOS)
    with pytest.raises(DataError, match="example 1: the answer goes on behind </s>"):
        ids(f"t9 {END} t8")
    assert ids("t9", most=6).prompt == (1, -2, 5, unknown, 6, -1)
    assert ids("t9", most=4).prompt == (1, -2, 6, -1), "what is too long is taken off the user's text"
    with pytest.raises(DataError, match=r"the template takes 3 tokens .* within 3 there is no room"):
        ids("t9", most=3)


def test_an_evaluation_keeps_them_too(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    named = {"template": RECORD.template, "task_tokens": RECORD.task_tokens}
    adapter = load_adapter(random_artefact(tmp_path / "a", model, 1, **named), model)
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": "t5 t6 t7", "completion": "t9", "label": "t9"}), encoding="utf-8")
    seen: list[Sequence[int]] = []

    def run(_: Decoding, prompts: Sequence[Sequence[int]]) -> Iterator[Any]:
        seen.extend(prompts)
        return iter(())

    monkeypatch.setattr(Decoding, "run", run)
    generation = GenerationDefaults(max_tokens=model.max_context - 4)
    record = RECORD.model_copy(update={"generation": generation})
    for asked in (adapter, None):
        evaluate(model, tokenizer, record, asked, path, stop_ids=frozenset({EOS}))
    assert seen == [(1, -2, 7, -1), (1, 7)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task_tokens": {"<|other|>": None}}, r"task_tokens: the template does not use <\|other\|>"),
        ({"task_tokens": {"topic": None}}, r"task_tokens: a task token is called like"),
        ({"method": "full", "config": {}}, "task_tokens: a fully fine-tuned model has embeddings of its own"),
        ({"end_token": "<|topic|>"}, r"end_token: the end token '<\|topic\|>' ends answers"),
        ({"template": "<|topic|><|answer|>"}, r"template: a template holds \{prompt\} exactly once"),
        ({"task_tokens": {"<|topic|>": "", "<|answer|>": None}}, "cannot begin as ''"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: dict[str, Any],
    message: str,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    with pytest.raises((DataError, AdapterError), match=message):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "out", **TOKENS | more))
    assert not (tmp_path / "out").exists()


def test_the_command(data: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["train", "--task", "toy", "--data", str(data), "--out", str(tmp_path / "out"), "--r", "4"]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--max-steps", "2", "--batch", "4"]
    command += ["--template", "<|topic|> {prompt} <|answer|>", "--end-token", END]
    command += ["--task-tokens", "<|answer|>", "--task-tokens", "<|topic|>=t7 t8"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    told = f"prad eval --adapter {tmp_path / 'out'} --data {data / 'test.jsonl'}"
    assert f"{told} --model {tiny_model('llama')}\n" in ended.output
    record = read_artefact(tmp_path / "out").record
    assert record.training["task_tokens"] == {"<|answer|>": None, "<|topic|>": "t7 t8"}
    twice = CliRunner().invoke(app, [*command, "--task-tokens", "<|topic|>"])
    assert twice.exit_code == 2
    assert "<|topic|> is named twice" in twice.output
