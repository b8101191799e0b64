"""What PEFT says with an adapter of its own, we say with the imported one; and back again in PEFT.

A prompt is all prompt: at its positions PEFT's forward with the adapter everywhere and ours must agree.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

from prad.artefact import PROMPT_FIELD
from prad.exchange import export_folder, import_folder
from prad.lm import LanguageModel
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, TOLERANCE, apart, import_and_back, ours, saved, settings

pytestmark = pytest.mark.filterwarnings(*IGNORED)

FUSED = {"fan_in_fan_out": True}
ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lambda: LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "negative alpha": ("llama", lambda: LoraConfig(r=4, lora_alpha=-8, target_modules=["q_proj", "v_proj"])),
    "mistral": ("mistral", lambda: LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"])),
    "rslora": ("llama", lambda: LoraConfig(r=5, use_rslora=True, target_modules="all-linear")),
    "regex": ("llama", lambda: LoraConfig(r=3, target_modules=r".*\.[02]\..*(q|down)_proj")),
    "excluded": (
        "mistral",
        lambda: LoraConfig(
            target_modules=["k_proj", "gate_proj"], exclude_modules=["model.layers.1.mlp.gate_proj"]
        ),
    ),
    "some layers": (
        "llama",
        lambda: LoraConfig(
            r=4, target_modules=["v_proj"], layers_to_transform=[1, 3], layers_pattern="layers"
        ),
    ),
    "rank and alpha patterns": (
        "llama",
        lambda: LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 2},
            alpha_pattern={r".*\.2\..*v_proj": 11, "down_proj": 5},
        ),
    ),
    "rslora with rank pattern": (
        "mistral",
        lambda: LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"], rank_pattern={"2.*q_proj": 9}),
    ),
    "fused": ("gpt2", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], **FUSED)),
    "fused and others": (
        "gpt2",
        lambda: LoraConfig(
            r=4, target_modules="all-linear", rank_pattern={"attn.c_attn": 6, "mlp.c_proj": 2}, **FUSED
        ),
    ),
    "dora": ("llama", lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora in some layers": (
        "mistral",
        lambda: LoraConfig(
            r=4,
            use_dora=True,
            target_modules=["k_proj", "o_proj"],
            layers_to_transform=2,
            rank_pattern={"o_proj": 6},
        ),
    ),
    "fused dora": (
        "gpt2",
        lambda: LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_fc"], **FUSED),
    ),
    "ia3": ("llama", lambda: IA3Config()),
    "ia3 of mistral": ("mistral", lambda: IA3Config()),
    "fused ia3": ("gpt2", lambda: IA3Config(fan_in_fan_out=True)),
    "ia3 elsewhere": (
        "llama",
        lambda: IA3Config(target_modules=r".*\.[13]\..*(q|gate|down)_proj", feedforward_modules=[]),
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_imported_and_exported_again_it_says_what_peft_says(
    name: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    family, make = ADAPTERS[name]
    config = make()
    config.task_type = "CAUSAL_LM"
    folder, model = tiny_model(family), load_tiny(family)
    artefact = import_and_back(config, folder, model, tmp_path)
    assert artefact.record.template == PROMPT_FIELD
    assert artefact.record.training["imported"]["positions"] == "all"
    again = import_folder(tmp_path / "back", tmp_path / "again", model, settings(folder))
    assert apart(ours(model, again), ours(model, artefact)) < TOLERANCE
    assert again.record.training["imported"]["positions"] == "all", "it is still what PEFT trained"


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_what_need_not_change_is_kept_bit_for_bit(
    name: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    family, make = ADAPTERS[name]
    folder = tiny_model(family)
    saved(folder, tmp_path / "peft", make())
    artefact = import_folder(tmp_path / "peft", tmp_path / "ours", load_tiny(family), settings(folder))
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(artefact.weights)
    assert len(before) == len(after)
    for site, path in {"q": "self_attn.q_proj", "v": "self_attn.v_proj"}.items():
        for part in ("lora_A", "lora_B"):
            stored = before[f"base_model.model.model.layers.2.{path}.{part}.weight"]
            assert torch.equal(after[f"layers.2.{site}.{part}"], stored)


def test_a_fused_change_of_one_part_becomes_that_part_only(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """As exported by us, or trained elsewhere with part of c_attn frozen."""
    model = load_tiny("gpt2")
    config = {"r": 3, "targets": ["q", "v"], "alpha": 5.0}
    first = random_artefact(tmp_path / "first", model, 4, method="prad-lora", config=config)
    export_folder(first, tmp_path / "peft", model)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert stored["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"].shape == (6, 48)
    assert stored["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].shape == (144, 6)
    again = import_folder(tmp_path / "peft", tmp_path / "again", model, settings(Path("tiny")))
    before, after = load_file(first.weights), load_file(again.weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.record.config == first.record.config
