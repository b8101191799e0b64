"""PEFT's LoRA, DoRA and IA3 in every family, however its projections are called or fused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig

from prad.exchange import export_folder, import_folder
from prad.lm import LanguageModel
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, apart, loaded, ours, said, saved, settings

pytestmark = pytest.mark.filterwarnings(IGNORED)
FAMILIES = ["qwen3", "gemma3", "opt", "gpt-neox"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=7, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: IA3Config(),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_imported_and_exported_again_it_says_what_peft_says(
    name: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    folder, model = tiny_model(family), load_tiny(family)
    expected = saved(folder, tmp_path / "peft", CONFIGS[name]())
    artefact = import_folder(tmp_path / "peft", tmp_path / "ours", model, settings(folder))
    assert apart(ours(model, artefact), expected) < 1e-4
    assert apart(ours(model, None), expected) > 1e-2, "the adapter must matter"
    export_folder(artefact, tmp_path / "back", model, base_name=str(folder))
    assert apart(said(loaded(folder, tmp_path / "back")), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prad-lora", "prad-dora", "prad-ia3"])
def test_peft_says_what_we_say(
    method: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model = load_tiny(family)
    artefact = random_artefact(tmp_path / "ours", model, 2, method=method, config={})
    export_folder(artefact, tmp_path / "peft", model)
    expected = ours(model, artefact)
    assert apart(said(loaded(tiny_model(family), tmp_path / "peft")), expected) < 1e-4
    assert apart(ours(model, None), expected) > 1e-2, "the adapter must matter"
