"""What a step and an evaluation sum up, how the learning rate goes, and which checkpoint is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from prad.adapters import load_adapter
from prad.artefact import WEIGHTS, read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.train import train
from prad.training.trainer import CompletionTrainer
from tests.training.toy import answers_of_unequal_length, settings, validation_loss


def test_accumulated_batches_make_the_step_of_one_large_batch(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """Labels are counted over the whole step: examples of unequal length weigh what they weigh together."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    uneven = answers_of_unequal_length(tmp_path / "data")
    weights = []
    for batch, accumulate in ((12, 1), (3, 4)):
        out = tmp_path / f"{batch}"
        train(
            model, tokenizer, "tiny", settings(uneven, out, batch=batch, accumulate=accumulate, max_steps=8)
        )
        weights.append(load_file(out / WEIGHTS))
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 5, 48])
def test_the_validation_loss_is_that_of_all_tokens_whatever_the_batches(
    batch: int, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    uneven = answers_of_unequal_length(tmp_path / "data")
    out = tmp_path / "out"
    record = train(model, tokenizer, "tiny", settings(uneven, out, batch=batch, max_steps=2))
    expected = validation_loss(model, tokenizer, uneven, load_adapter(read_artefact(out), model))
    assert record.training["validation_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_learning_rate_rises_and_falls_by_equal_steps(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step has some: none is without effect."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    rates: list[float] = []
    original = CompletionTrainer.training_step

    def noted(self: CompletionTrainer, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "training_step", noted)
    train(
        model,
        tokenizer,
        "tiny",
        settings(data, tmp_path, max_steps=8, learning_rate=1.0, warmup_ratio=0.4, eval_every=100),
    )
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 3 / 4, 1 / 2, 1 / 4])


def test_the_checkpoint_with_the_least_validation_loss_is_kept(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    losses: list[float] = []
    states: list[torch.Tensor] = []
    original = Trainer.evaluate

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = original(self, *args, **kwargs)
        metrics["eval_loss"] = [3.0, 1.0, 2.0, 4.0][len(losses)]  # the second is the best
        losses.append(metrics["eval_loss"])
        states.append(self.model.ffn_up.detach().clone())
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", noted)
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=8, eval_every=2))
    kept = load_file(tmp_path / WEIGHTS)["layers.0.ffn.up"]
    assert len(states) == 4
    assert torch.equal(kept, states[1][0])
    assert record.training["validation_loss"] == 1.0


def test_training_stops_when_the_validation_loss_no_longer_falls(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.1, 1.2, 1.3, 0.1])
    original = CompletionTrainer.evaluation_loop

    def noted(self: CompletionTrainer, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(CompletionTrainer, "evaluation_loop", noted)
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=40, eval_every=2, patience=3))
    assert record.training["steps"] == 14, "three evaluations after the best, which is the fourth"
    assert record.training["validation_loss"] == 1.0
