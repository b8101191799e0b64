"""What the installed PEFT makes and says: adapters with weight on every parameter, and its logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prad.adapters import PromptAdaptation, load_adapter, placeholders
from prad.artefact import Artefact
from prad.exchange import ImportSettings, export_folder, import_folder
from prad.lm import LanguageModel, PackedBatch

# What PEFT asks of transformers by names that went out of use: not the fault of any adapter.
# To be dropped when PEFT's newest release no longer does (`make test-latest` without them).
IGNORED = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`past_key_values` is deprecated:FutureWarning",
)
TOLERANCE = 1e-4
PROMPTS = [[3, 17, 64, 9, 9, 101], list(range(40, 75)), [7]]  # one longer than mistral's window of 24


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def settings(model: Path, **more: Any) -> ImportSettings:
    return ImportSettings(base_name=model.name, **more)


def saved(model: Path, out: Path, config: peft.PeftConfig, seed: int = 0) -> list[Tensor]:
    """Writes a random PEFT adapter for `model` to `out`; its logits."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name or "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            elif "lora_" in name:
                parameter.normal_(0.0, 0.2)
            elif "prompt_encoder" in name:
                parameter.normal_(0.0, 1.0)
    adapted.save_pretrained(out)
    return said(adapted.eval())


def loaded(model: Path, folder: Path) -> Any:
    """The folder in PEFT, as anyone loads it."""
    return peft.PeftModel.from_pretrained(base(model), folder).eval()


def said(adapted: Any, texts: Sequence[Sequence[int]] = PROMPTS) -> list[Tensor]:
    """Logits [tokens, vocab] of each text."""
    with torch.inference_mode():
        return [adapted(input_ids=torch.tensor([t])).logits[0, -len(t) :].clone() for t in texts]


def ours(model: LanguageModel, artefact: Artefact | None) -> list[Tensor]:
    """The same from a packed prompt pass of ours, virtual tokens in front."""
    adapter = None if artefact is None else load_adapter(artefact, model)
    virtual = placeholders(0 if adapter is None else adapter.virtual_tokens)
    sequences = [[*virtual, *prompt] for prompt in PROMPTS]
    lengths = [len(s) for s in sequences]
    adaptation = PromptAdaptation.of_prompts([adapter] * len(PROMPTS), lengths, lengths, "cpu")
    with torch.inference_mode():
        batch = PackedBatch.of_sequences(sequences, logit_rows=range(sum(lengths)))
        every = model.forward(batch, adaptation).split(lengths)
    return [logits[len(virtual) :] for logits in every]


def apart(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the expected logits' range."""
    spans = [float(e.max() - e.min()) for e in expected]
    return max(float((g - e).abs().max()) / s for g, e, s in zip(got, expected, spans, strict=True))


def import_and_back(config: peft.PeftConfig, folder: Path, model: LanguageModel, root: Path) -> Artefact:
    """Asserts that a random adapter of PEFT's says the same imported here, and in PEFT when exported again.

    Leaves `peft`, `ours` (which is returned) and `back` below `root`.
    """
    expected = saved(folder, root / "peft", config)
    artefact = import_folder(root / "peft", root / "ours", model, settings(folder))
    assert apart(ours(model, artefact), expected) < TOLERANCE
    assert apart(ours(model, None), expected) > 100 * TOLERANCE, "the adapter must matter"
    export_folder(artefact, root / "back", model, base_name=str(folder))
    assert apart(said(loaded(folder, root / "back")), expected) < TOLERANCE
    return artefact


def export_and_compare(artefact: Artefact, folder: Path, model: LanguageModel, out: Path) -> None:
    """Asserts that PEFT, loading what is exported to `out`, says what we say."""
    export_folder(artefact, out, model)
    expected = ours(model, artefact)
    assert apart(said(loaded(folder, out)), expected) < TOLERANCE
    assert apart(ours(model, None), expected) > 100 * TOLERANCE, "the adapter must matter"
