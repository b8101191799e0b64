"""The baseline that our server is measured against computes what it claims: adapters at every token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.own_engine import OwnEngine
from prad.adapters import load_adapter
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from tests.conftest import random_artefact
from tests.oracle.reference import Reference

PROMPTS = [[3, 1, 4], list(range(20, 60)), [9] * 16, [7, 8]]
OUTPUT = 20


@pytest.mark.parametrize("method", ["prad-pa", "prad-lora"])
def test_every_token_is_the_references(
    method: str, tiny_model: Callable[[str], Path], kernels: Kernels, tmp_path: Path
) -> None:
    model, reference = (
        LanguageModel.load(tiny_model("llama"), dtype=torch.float32),
        Reference(tiny_model("llama")),
    )
    model.accelerate(kernels)
    artefacts = [
        random_artefact(tmp_path / str(seed), model, seed, method=method) for seed in range(len(PROMPTS))
    ]
    engine = OwnEngine(model, [load_adapter(artefact, model) for artefact in artefacts])
    answers = engine.answers(PROMPTS, OUTPUT)
    for prompt, tokens, artefact in zip(PROMPTS, answers, artefacts, strict=True):
        assert len(tokens) == OUTPUT
        for i, token in enumerate(tokens):  # what lies before a token is all prompt
            expected = reference.logits([*prompt, *tokens[:i]], [token], artefact.folder)
            assert int(expected.argmax()) == token
    plain = OwnEngine(model).answers(PROMPTS, OUTPUT)
    assert answers != plain
    assert OwnEngine(model, recorded=False).answers(PROMPTS, OUTPUT) == plain
