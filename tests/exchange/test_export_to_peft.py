"""Our adapters in PEFT, loaded as anyone would, with warnings as errors: the same logits on prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prad.adapters import BaseMismatchError
from prad.artefact import ArtefactError, GenerationDefaults, read_artefact, write_record
from prad.exchange import ExchangeError, export_folder, import_folder
from prad.lm import LanguageModel
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, TOLERANCE, apart, export_and_compare, ours, settings

pytestmark = pytest.mark.filterwarnings(*IGNORED)

EVERY = ["q", "k", "v", "o", "up", "down"]
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "prad-lora", {}),
    "every projection": ("mistral", "prad-lora", {"r": 3, "alpha": 7, "targets": [*EVERY, "gate"]}),
    "fused q and v": ("gpt2", "prad-lora", {"r": 4, "alpha": 8}),
    "fused beside plain": ("gpt2", "prad-lora", {"r": 4, "targets": EVERY}),
    "fused rslora": ("gpt2", "prad-lora", {"r": 4, "rslora": True, "targets": ["k", "v", "down"]}),
    "dora": ("llama", "prad-dora", {"r": 4}),
    "fused dora": ("gpt2", "prad-dora", {"r": 4, "targets": ["k", "o"]}),
    "ia3": ("llama", "prad-ia3", {}),
    "ia3 of mistral": ("mistral", "prad-ia3", {"targets": ["q", "down_in", "gate"]}),
    "fused ia3": ("gpt2", "prad-ia3", {"targets": ["k", "down_in"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_says_what_we_say(
    name: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    family, method, config = ADAPTERS[name]
    model = load_tiny(family)
    artefact = random_artefact(tmp_path / "ours", model, 2, method=method, config=config)
    export_and_compare(artefact, tiny_model(family), model, tmp_path / "peft")
    again = import_folder(tmp_path / "peft", tmp_path / "again", model, settings(Path("tiny")))
    assert apart(ours(model, again), ours(model, artefact)) < TOLERANCE


def test_what_peft_cannot_hold_comes_back_from_prad_json(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    artefact = random_artefact(
        tmp_path / "ours",
        model,
        1,
        method="prad-lora",
        config={},
        template="Q: {prompt} A:",
        generation=GenerationDefaults(max_tokens=9, stop=("\n",)),
        licence="MIT",
        training={"steps": 3},
    )
    (artefact.folder / "README.md").write_text("the card", encoding="utf-8")
    export_folder(read_artefact(artefact.folder), tmp_path / "peft", model, base_name="org/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/base"
    assert (tmp_path / "peft" / "README.md").read_text(encoding="utf-8") == "the card"
    again = import_folder(tmp_path / "peft", tmp_path / "b", model, settings(Path("tiny"), max_tokens=5))
    assert again.record.template == "Q: {prompt} A:"
    assert again.record.generation == GenerationDefaults(max_tokens=5, stop=("\n",))
    assert again.record.licence == "MIT"
    assert again.record.training["steps"] == 3
    assert again.record.training["imported"]["positions"] == "prompt"


def test_a_peft_folder_is_not_taken_for_an_artefact(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    artefact = random_artefact(tmp_path / "ours", load_tiny("llama"), 1, method="prad-lora", config={})
    export_folder(artefact, tmp_path / "peft", load_tiny("llama"))
    with pytest.raises(ArtefactError, match=r"PEFT's layout \(base_model\..*prad adapter import"):
        read_artefact(tmp_path / "peft")


def test_what_peft_does_not_have_is_refused(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    parallel = random_artefact(tmp_path / "pa", model, 1)
    with pytest.raises(ExchangeError, match="PEFT has no prad-pa; it has prad-lora, "):
        export_folder(parallel, tmp_path / "out", model)
    both = random_artefact(
        tmp_path / "ia3", model, 1, method="prad-ia3", config={"targets": ["down", "down_in"]}
    )
    with pytest.raises(ExchangeError, match=r"input or the output of mlp\.down_proj"):
        export_folder(both, tmp_path / "out", model)
    lora = random_artefact(tmp_path / "lora", model, 1, method="prad-lora", config={})
    with pytest.raises(BaseMismatchError, match="trained for architecture"):
        export_folder(lora, tmp_path / "out", load_tiny("gpt2"))
    write_record(
        lora.folder,
        lora.record.model_copy(update={"base": lora.record.base.model_copy(update={"weights": "0" * 64})}),
    )
    with pytest.raises(BaseMismatchError, match="trained on weights 0000"):
        export_folder(read_artefact(lora.folder), tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    export_folder(read_artefact(lora.folder), tmp_path / "out", model, allow_other_weights=True)
    with pytest.raises(ExchangeError, match="is there already"):
        export_folder(read_artefact(lora.folder), tmp_path / "out", model, allow_other_weights=True)
