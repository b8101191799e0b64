"""Baselines on all positions are what PEFT means: what it generates, we decode, and in both directions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PromptTuningConfig

from prad.adapters import load_adapter
from prad.artefact import Artefact
from prad.core.search import Limits
from prad.exchange import ExchangeError, export_folder, import_folder
from prad.lm import LanguageModel
from prad.training.decoding import AdaptedModel
from prad.training.evaluate import decoder
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, PROMPTS, loaded, said, saved, settings

pytestmark = pytest.mark.filterwarnings(*IGNORED)
TOKENS = 12
BASELINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "prad-lora", {"targets": ["q", "v", "gate", "down"]}),
    "fused lora": ("gpt2", "prad-lora", {}),
    "dora": ("llama", "prad-dora", {"r": 4}),
    "ia3": ("mistral", "prad-ia3", {}),
}
OF_PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "ia3": lambda: IA3Config(),
}


def answers(model: LanguageModel, artefact: Artefact) -> list[list[int]]:
    """What `prad eval` decodes greedily, at the positions that the record names."""
    adapter = load_adapter(artefact, model, allow_all_positions=True)
    adapted = AdaptedModel(model, adapter, artefact.record.positions)
    found = decoder(adapted, Limits(TOKENS, frozenset())).run(PROMPTS)
    return [list(search.answer) for _, search in sorted(found, key=lambda pair: pair[0])]


def behind(adapted: Any, given: Sequence[Sequence[int]]) -> float:
    """How far the worst token of these answers lies below what PEFT would choose, as a share of the logits'
    range: 0 is what it generates."""
    worst = 0.0
    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, given, strict=True)]
    for logits, answer in zip(said(adapted, texts), given, strict=True):
        steps = logits[-len(answer) - 1 : -1]
        chosen = steps.gather(1, steps.new_tensor(answer).long()[:, None])[:, 0]
        worst = max(worst, float((steps.max(dim=1).values - chosen).max() / (logits.max() - logits.min())))
    return worst


@pytest.mark.parametrize("name", BASELINES)
def test_peft_generates_what_our_baseline_says(
    name: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    family, method, config = BASELINES[name]
    folder, model = tiny_model(family), load_tiny(family)
    baseline = random_artefact(
        tmp_path / "ours", model, 2, method=method, config=config, positions="all", training={"steps": 3}
    )
    export_folder(baseline, tmp_path / "peft", model)
    adapted = loaded(folder, tmp_path / "peft")
    assert behind(adapted, answers(model, baseline)) < 1e-4

    served = import_folder(tmp_path / "peft", tmp_path / "served", model, settings(Path("tiny")))
    assert served.record.positions == "prompt"
    assert served.record.training["imported"]["positions"] == "all"
    assert served.record.training["steps"] == 3
    assert behind(adapted, answers(model, served)) > 1e-2, "on the prompt alone it says something else"

    same = settings(Path("tiny"), positions="all")
    again = import_folder(tmp_path / "peft", tmp_path / "again", model, same)
    assert again.record.positions == "all"
    assert answers(model, again) == answers(model, baseline)


@pytest.mark.parametrize("name", OF_PEFT)
def test_a_peft_file_becomes_a_baseline_where_that_is_asked_for(
    name: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    folder, model = tiny_model("llama"), load_tiny("llama")
    saved(folder, tmp_path / "peft", OF_PEFT[name]())
    baseline = import_folder(tmp_path / "peft", tmp_path / "ours", model, settings(folder, positions="all"))
    adapted = loaded(folder, tmp_path / "peft")
    assert behind(adapted, answers(model, baseline)) < 1e-4
    export_folder(baseline, tmp_path / "back", model, base_name=str(folder))
    assert behind(loaded(folder, tmp_path / "back"), answers(model, baseline)) < 1e-4


def test_virtual_tokens_have_no_form_for_all_positions(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    saved(folder, tmp_path / "peft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(
        ExchangeError, match="PROMPT_TUNING puts tokens in front of the prompt and acts nowhere"
    ):
        import_folder(
            tmp_path / "peft", tmp_path / "out", load_tiny("llama"), settings(folder, positions="all")
        )
    assert not (tmp_path / "out").exists()
