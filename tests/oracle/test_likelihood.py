"""Log-likelihoods of given answers are the monolithic forward's, with the adapter masked to the prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prad.adapters import METHODS, load_adapter
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import Example
from prad.training.likelihood import log_likelihoods
from tests.conftest import EOS, random_artefact
from tests.oracle.reference import Fault, Reference
from tests.oracle.test_oracle import SETTINGS

PROMPTS = ([5, 9, 33, 80, 2], [7, 64, 12], [*range(20, 60)])
ANSWERS = ([3, 4, 5], [100, 101], [9, 8, 7, 6, 5])


def words(ids: list[int]) -> str:
    return " ".join(f"t{number}" for number in ids)


@pytest.mark.parametrize("method", METHODS)
def test_they_are_the_references(
    method: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = load_tiny("llama"), tiny_model("llama")
    settings: dict[str, Any] = SETTINGS.get(method, {})
    artefact = random_artefact(
        tmp_path / "red", model, 4, method=method, config=settings, template="{prompt}"
    )
    reference, adapter = Reference(folder), load_adapter(artefact, model)
    examples = [Example(prompt=words(p), completion=words(a)) for p, a in zip(PROMPTS, ANSWERS, strict=True)]

    def expected(fault: Fault | None = None) -> list[float]:
        totals = []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            output = [*answer, EOS]
            logits = reference.logits(prompt, output, artefact.folder, fault).log_softmax(-1)
            totals.append(float(logits[torch.arange(len(output)), output].sum()))
        return totals

    for pass_tokens in (4096, 8):  # all in one pass, and each in its own
        monkeypatch.setattr("prad.training.likelihood._PASS_TOKENS", pass_tokens)
        found = log_likelihoods(model, Tokenizer(folder), artefact.record, adapter, examples)
        assert [each.tokens for each in found] == [4, 3, 6]
        assert [each.total for each in found] == pytest.approx(expected(), abs=2e-3)
    leaking = expected(Fault.ADAPTER_ON_ONE_GENERATED_TOKEN)
    assert max(abs(a - each.total) for a, each in zip(leaking, found, strict=True)) > 1e-2
