"""A PEFT folder becomes an artefact: checked, converted, loaded once as serving would, then put in place."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prad.adapters import load_adapter, save_parameters
from prad.artefact import WEIGHTS, Artefact, read_artefact, write_record
from prad.exchange.errors import ExchangeError, TensorError
from prad.exchange.folders import new_folder, require_new
from prad.exchange.ia3 import import_ia3
from prad.exchange.imported import Imported
from prad.exchange.lora import import_lora
from prad.exchange.modules import Modules
from prad.exchange.peft_config import IA3Source, LoraSource, PrefixSource, Source, read_peft_config
from prad.exchange.records import ImportSettings, imported_record
from prad.exchange.virtual import import_prefix, import_prompt
from prad.lm import LanguageModel

_PICKLE = "adapter_model.bin"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def import_folder(source: Path, out: Path, model: LanguageModel, settings: ImportSettings) -> Artefact:
    """Writes the artefact `out` of the PEFT folder `source`, for `model`.

    Raises ExchangeError, AdapterError or ModelError; then `out` is not there.
    """
    require_new(out)
    config = read_peft_config(source)
    record = imported_record(source, config, model, settings)
    imported = _convert(config, _read_weights(source), Modules(model))
    record = record.model_copy(
        update={
            "method": imported.method,
            "config": imported.config,
            "virtual_tokens": imported.virtual_tokens,
        }
    )
    if record.positions == "all" and imported.virtual_tokens:
        raise ExchangeError(
            f"{config.peft_type} puts tokens in front of the prompt and acts nowhere else: it has no form "
            "for all positions"
        )
    with new_folder(out) as folder:
        save_parameters(imported.parameters, folder, imported.dtype)
        write_record(folder, record)
        # what would be refused later is refused here
        load_adapter(read_artefact(folder), model, allow_all_positions=True)
    return read_artefact(out)


def _convert(config: Source, tensors: Mapping[str, Tensor], modules: Modules) -> Imported:
    if isinstance(config, LoraSource):
        return import_lora(config, tensors, modules)
    if isinstance(config, IA3Source):
        return import_ia3(config, tensors, modules)
    if isinstance(config, PrefixSource):
        return import_prefix(config, tensors, modules)
    return import_prompt(config, tensors, modules)


def _read_weights(source: Path) -> dict[str, Tensor]:
    path = source / WEIGHTS
    if not path.is_file() and (source / _PICKLE).is_file():
        raise ExchangeError(
            f"{source} holds {_PICKLE}, expected {WEIGHTS}: a pickle can run code when it is read, so it is "
            "not; where you trust it, load it in PEFT and save it again"
        )
    if not path.is_file():
        raise ExchangeError(f"{source} holds no {WEIGHTS}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExchangeError(
            f"{path} is not a whole safetensors file ({error}); was it cut off, or only a pointer to it "
            "fetched?"
        ) from error
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _DTYPES:
            raise TensorError(name, " or ".join(map(str, _DTYPES)), tensor.dtype)
    return tensors
