"""PEFT cannot hold task tokens: an artefact that has some is not exported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prad.exchange import ExchangeError, export_folder
from prad.lm import LanguageModel
from tests.conftest import random_artefact


def test_export_is_refused(load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = load_tiny("llama")
    artefact = random_artefact(
        tmp_path / "ours",
        model,
        1,
        method="prad-lora",
        config={},
        template="<|topic|> {prompt}",
        task_tokens=("<|topic|>",),
    )
    with pytest.raises(ExchangeError, match=r"PEFT has no place for task tokens: <\|topic\|>"):
        export_folder(artefact, tmp_path / "peft", model)
    assert not (tmp_path / "peft").exists()
