"""PEFT's methods in every family: however its projections are called or fused, however many heads of which
width it caches, and behind more learned tokens than a sliding window holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from prad.lm import LanguageModel
from tests.conftest import CONFIGS as EVERY_FAMILY
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, export_and_compare, import_and_back

pytestmark = pytest.mark.filterwarnings(*IGNORED)
FAMILIES = ["qwen3", "gemma3", "opt", "gpt-neox"]  # the others: test_import_from_peft, test_export_to_peft
IN_WEIGHTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=7, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: IA3Config(),
}
IN_FRONT: dict[str, Callable[..., Any]] = {
    "prefix": lambda n: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n),
    "projected prefix": lambda n: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": lambda n: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n),
}
TOKENS = [(family, 5) for family in EVERY_FAMILY] + [("mistral", 30), ("gemma3", 30)]  # windows of 24


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IN_WEIGHTS)
def test_imported_and_exported_again_it_says_what_peft_says(
    name: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    import_and_back(IN_WEIGHTS[name](), tiny_model(family), load_tiny(family), tmp_path)


@pytest.mark.parametrize(("family", "tokens"), TOKENS)
@pytest.mark.parametrize("name", IN_FRONT)
def test_learned_tokens_imported_and_exported_again_say_what_peft_says(
    name: str,
    family: str,
    tokens: int,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    import_and_back(IN_FRONT[name](tokens), tiny_model(family), load_tiny(family), tmp_path)


@pytest.mark.parametrize(
    ("method", "family", "config"),
    [
        *((f"prad-{name}", family, {}) for name in IN_WEIGHTS for family in FAMILIES),
        *(
            (method, family, {"virtual_tokens": tokens})
            for method in ("prad-prefix", "prad-prompt")
            for family, tokens in TOKENS
        ),
    ],
)
def test_peft_says_what_we_say(
    method: str,
    family: str,
    config: dict[str, Any],
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model = load_tiny(family)
    artefact = random_artefact(tmp_path / "ours", model, 2, method=method, config=config)
    export_and_compare(artefact, tiny_model(family), model, tmp_path / "peft")
