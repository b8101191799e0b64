"""`train` on a toy task: it learns, the frozen weights stay, and the same seed gives the same adapter."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prad.adapters import METHODS, find_method, load_adapter, new_adapter
from prad.artefact import WEIGHTS, read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError
from prad.training.evaluate import evaluate
from prad.training.progress import CURVE
from prad.training.train import train
from tests.training.toy import frozen_digest, settings, validation_loss


def test_it_learns_and_the_frozen_weights_stay(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    before = frozen_digest(model)
    fresh = validation_loss(model, tokenizer, data, adapter=None)
    record = train(
        model, tokenizer, "tiny", settings(data, tmp_path, max_steps=100, max_tokens=1, licence="MIT")
    )
    assert frozen_digest(model) == before
    assert not any(p.requires_grad for p in model.module.parameters())

    artefact = read_artefact(tmp_path)
    assert artefact.record == record
    assert (record.licence, record.training["steps"], record.training["examples"]) == ("MIT", 100, 256)
    assert record.base.weights == model.fingerprint.weights
    assert {p.name for p in tmp_path.iterdir()} == {"prad.json", WEIGHTS, CURVE}
    scores = {}
    for name, adapter in (("adapter", load_adapter(artefact, model)), ("plain", None)):
        result = evaluate(
            model, tokenizer, record, adapter, data / "test.jsonl", stop_ids=frozenset({tokenizer.eos_id})
        )
        assert len(result.answers) == result.examples == 64
        scores[name] = result.scores["accuracy"]
    assert scores["adapter"] > 95
    assert scores["plain"] < 60
    learnt = validation_loss(model, tokenizer, data, load_adapter(artefact, model))
    assert learnt == pytest.approx(record.training["validation_loss"], rel=1e-3, abs=1e-4)
    assert learnt < 0.7 * fresh, "what is left is the end of the answer, which the plain model decides"


def test_seeds(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("gpt2"), Tokenizer(tiny_model("gpt2"))

    def weights(out: str, seed: int) -> str:
        train(model, tokenizer, "tiny", settings(data, tmp_path / out, max_steps=6, eval_every=3, seed=seed))
        return hashlib.sha256((tmp_path / out / WEIGHTS).read_bytes()).hexdigest()

    assert weights("one", 1) == weights("again", 1)
    assert weights("one more", 2) != weights("two", 1)


@pytest.mark.parametrize(("steps", "eval_every"), [(1, 1000), (3, 1000), (6, 4)])
def test_a_run_shorter_than_the_first_evaluation_is_saved(
    steps: int,
    eval_every: int,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    """One step or three, evaluated at the end; or six, the last two of them after the last evaluation."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=steps, eval_every=eval_every))
    assert record.training["steps"] == steps
    method = find_method("prad-pa")
    fresh = new_adapter(method, method.config_type.model_validate({"r": 8}), model, 0)
    trained = load_adapter(read_artefact(tmp_path), model)
    assert not torch.equal(trained.parameters["ffn.up"], fresh.parameters["ffn.up"])


def test_only_so_many_examples(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, examples=40, batch=16))
    assert (record.training["examples"], record.training["steps"]) == (40, 3)
    assert record.training["tokens_per_second"] > 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_loads(
    method: str,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, tokenizer = load_tiny("gpt2"), Tokenizer(tiny_model("gpt2"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, method=method, config={}, max_steps=20))
    artefact = read_artefact(tmp_path)
    assert artefact.record == record
    assert load_adapter(artefact, model).method.name == method
    found = find_method(method)
    fresh = validation_loss(model, tokenizer, data, new_adapter(found, found.configure({}), model, seed=0))
    assert record.training["validation_loss"] < fresh, "it has learnt something"


def test_nothing_is_written_over_and_no_broken_adapter_is_kept(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="file is no folder that can be written to"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "file" / "out", max_steps=1))
    with pytest.raises(DataError, match="/proc/none/out cannot be made"):
        train(model, tokenizer, "tiny", settings(data, Path("/proc/none/out"), max_steps=1))
    bad = settings(data, tmp_path / "bad", max_steps=40, learning_rate=1e38)
    with pytest.raises(DataError, match=r"the training loss is nan at step 20: try a lower learning rate$"):
        train(model, tokenizer, "tiny", bad)
    assert not (tmp_path / "bad" / WEIGHTS).exists()
    train(model, tokenizer, "tiny", settings(data, tmp_path / "bad", max_steps=1))
    later = settings(data, tmp_path / "later", max_steps=40, eval_every=2, learning_rate=1e38)
    with pytest.raises(DataError, match=r"nan at step 4: .*the best checkpoint before is .*checkpoint-2\)"):
        train(model, tokenizer, "tiny", later)
    train(model, tokenizer, "tiny", settings(data, tmp_path / "kept", max_steps=1))
    before = (tmp_path / "kept" / WEIGHTS).read_bytes()
    with pytest.raises(DataError, match="holds an adapter already"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "kept", max_steps=1))
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == before


def test_what_is_cut_is_said_and_an_end_token_that_is_nowhere_is_refused(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    train(model, tokenizer, "tiny", settings(data, tmp_path / "whole", max_steps=1, examples=20))
    assert "longer" not in capsys.readouterr().err
    train(model, tokenizer, "tiny", settings(data, tmp_path / "cut", max_steps=1, examples=20, max_prompt=1))
    assert "train.jsonl: 20 of 20 examples are longer" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match=r"train\.jsonl: no completion ends with the end token '<end>'"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "end", max_steps=1, end_token="<end>"))
    with pytest.raises(ValueError, match=r"warmup_ratio: .*, got 1\.5"):
        settings(data, tmp_path / "x", warmup_ratio=1.5)
