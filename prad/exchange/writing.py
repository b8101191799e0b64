"""An artefact becomes a folder that PEFT loads: its own two files, with our `prad.json` and card beside."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from prad.adapters import Adapter, load_adapter, stored_parameters
from prad.adapters.ia3 import IA3Config
from prad.adapters.lora import LoRAConfig
from prad.adapters.method import FrozenModel, Parameters
from prad.artefact import CARD, PEFT_CONFIG, RECORD, WEIGHTS, Artefact
from prad.exchange.errors import ExchangeError
from prad.exchange.exported import Exported
from prad.exchange.folders import new_folder, require_new
from prad.exchange.ia3 import export_ia3
from prad.exchange.lora_export import export_lora
from prad.exchange.modules import Modules
from prad.exchange.virtual import export_prefix, export_prompt
from prad.lm import DEFAULT_MODEL, DEFAULT_MODEL_ID, LanguageModel

EXPORTED = ("prad-lora", "prad-dora", "prad-ia3", "prad-prefix", "prad-prompt")


def export_folder(
    artefact: Artefact,
    out: Path,
    model: LanguageModel,
    *,
    base_name: str | None = None,
    allow_other_weights: bool = False,
) -> None:
    """Writes the PEFT folder `out`; `base_name` is what it calls the base model: if None the artefact's name,
    and for the default model its Hugging Face id.

    A baseline on all positions is just what PEFT means; one on the prompt acts on later tokens there as well.

    Raises ExchangeError, AdapterError or ModelError; then `out` is not there.
    """
    require_new(out)
    if artefact.record.method not in EXPORTED:
        raise ExchangeError(
            f"PEFT has no {artefact.record.method}; it has {', '.join(EXPORTED)} (as LORA with and without "
            "DoRA, IA3, PREFIX_TUNING, PROMPT_TUNING)"
        )
    if artefact.record.task_tokens:
        raise ExchangeError(
            f"PEFT has no place for task tokens: {', '.join(artefact.record.task_tokens)} are no ids of the "
            "base model's vocabulary"
        )
    base = artefact.record.base.name
    checked = load_adapter(artefact, model, allow_other_weights=allow_other_weights, allow_all_positions=True)
    names = checked.method.shapes(checked.config, FrozenModel(model))
    exported = _convert(checked, stored_parameters(artefact, names, model.num_layers), Modules(model))
    config = exported.fields | {
        "base_model_name_or_path": base_name or (DEFAULT_MODEL_ID if base == DEFAULT_MODEL else base),
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    with new_folder(out) as folder:
        save_file(exported.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        (folder / PEFT_CONFIG).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        for name in (RECORD, CARD):
            if (artefact.folder / name).is_file():
                shutil.copyfile(artefact.folder / name, folder / name)


def _convert(adapter: Adapter, stored: Parameters, modules: Modules) -> Exported:
    if isinstance(adapter.config, LoRAConfig):
        return export_lora(adapter.config, stored, modules, dora=adapter.method.name == "prad-dora")
    if isinstance(adapter.config, IA3Config):
        return export_ia3(adapter.config, stored, modules)
    if adapter.method.name == "prad-prefix":
        return export_prefix(stored, modules)
    return export_prompt(stored, modules)
