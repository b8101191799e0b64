"""Random adapters: their work is that of trained ones. Ours as artefacts, LoRA in PEFT's own files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from prad.adapters import Adapter, find_method, new_adapter, prepared, save_parameters
from prad.artefact import AdapterRecord, BaseModelRef, write_record
from prad.lm import LanguageModel


def random_adapters(model: LanguageModel, method: str, count: int, r: int, first: int = 0) -> list[Adapter]:
    """`count` adapters of a PrAd method, from number `first` on, as its files hold them: every parameter with
    weight, in the model's dtype."""
    kind = find_method(method)
    config = kind.config_type.model_validate({"r": r})
    adapters = []
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        parameters = {
            name: parameter.normal_(0.0, 0.02, generator=generator).to(model.device, model.dtype)
            for name, parameter in new_adapter(kind, config, model, seed).parameters.items()
        }
        adapters.append(Adapter(kind, config, parameters))
    return adapters


def ready_adapters(model: LanguageModel, method: str, count: int, r: int) -> list[Adapter]:
    """The same as a pass uses them."""
    return [prepared(adapter, model) for adapter in random_adapters(model, method, count, r)]


def write_artefacts(
    folder: Path, model: LanguageModel, method: str, count: int, r: int, first: int = 0
) -> list[str]:
    """Artefacts of `random_adapters`, a folder each; returns the folders' names, which become tasks."""
    fingerprint = model.fingerprint
    base = BaseModelRef(name="bench", architecture=fingerprint.architecture, weights=fingerprint.weights)
    names = [f"{method}-{i:03}" for i in range(first, first + count)]
    for name, adapter in zip(names, random_adapters(model, method, count, r, first), strict=True):
        path = folder / name
        path.mkdir(parents=True)
        save_parameters(adapter.parameters, path, model.dtype)
        write_record(path, AdapterRecord(method=method, config=adapter.config.model_dump(), base=base))
    return names


def write_peft_lora(folder: Path, model: LanguageModel, count: int, r: int) -> dict[str, str]:
    """LoRA adapters on q and v as PEFT stores them; returns {name: folder}."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = {"q_proj": config.num_attention_heads * head, "v_proj": config.num_key_value_heads * head}
    folders = {}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(model.num_layers):
            for module, width in widths.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                for part, shape in (("A", (r, model.hidden_size)), ("B", (width, r))):
                    weight = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
                    tensors[f"{prefix}.lora_{part}.weight"] = weight.to(model.dtype)
        path = folder / f"lora-{seed:03}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(
            json.dumps(_peft_config(r, sorted(widths))), encoding="utf-8"
        )
        folders[path.name] = str(path)
    return folders


def _peft_config(r: int, modules: list[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
