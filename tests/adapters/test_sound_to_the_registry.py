"""Whatever training writes is sound to a registry, which knows neither methods nor models: no adapter of ours
is refused there, of any method and family."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prad.adapters import METHODS, AdapterError, find_method
from prad.artefact import require_sound
from prad.lm import LanguageModel, MissingSiteError
from tests.conftest import SEEDS, random_artefact


@pytest.mark.parametrize("family", SEEDS)
def test_every_method(family: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model, sound = load_tiny(family), []
    for method in METHODS:
        fields = find_method(method).config_type.model_fields
        config = {name: value for name, value in (("r", 9), ("virtual_tokens", 3)) if name in fields}
        names = {"task_tokens": ("<|a|>",), "template": "<|a|> {prompt}"}
        try:
            artefact = random_artefact(tmp_path / method, model, 1, method=method, config=config, **names)
        except (MissingSiteError, AdapterError):  # not in this family
            continue
        require_sound(artefact)
        sound.append(method)
    assert len(sound) >= len(METHODS) - 3
