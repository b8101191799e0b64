"""PEFT's LoRA, DoRA and IA3 in every family, however its projections are called or fused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig

from prad.lm import LanguageModel
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, export_and_compare, import_and_back

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
    import_and_back(CONFIGS[name](), tiny_model(family), load_tiny(family), tmp_path)


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
    export_and_compare(artefact, tiny_model(family), model, tmp_path / "peft")
