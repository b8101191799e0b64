"""Where adapters come from: made anew for training, or loaded from an artefact's files; and back."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prad.adapters.adaptation import TASK_TOKENS, Adapter
from prad.adapters.bitfit import BitFit
from prad.adapters.dora import DoRA
from prad.adapters.errors import (
    AdapterError,
    BaseMismatchError,
    ParameterMismatchError,
    UnknownMethodError,
)
from prad.adapters.ia3 import IA3
from prad.adapters.lora import LoRA
from prad.adapters.mam import MaM
from prad.adapters.method import (
    INPUT,
    FrozenModel,
    Method,
    MethodConfig,
    Parameters,
    kept_in,
)
from prad.adapters.para import PARA, PromptPARA
from prad.adapters.parallel import ParallelAdapter
from prad.adapters.prefix import PrefixTuning
from prad.adapters.prompt_tuning import PromptTuning
from prad.adapters.sequential import SequentialAdapter
from prad.artefact import WEIGHTS, AdapterRecord, Artefact, require_servable
from prad.lm import LanguageModel, Tokenizer, require_sites

_DTYPES = ("F32", "F16", "BF16")
_LEAST_ROOM = 4  # positions behind the virtual tokens; with fewer there is no prompt and output worth a name

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ParallelAdapter(),
        SequentialAdapter(),
        LoRA(),
        DoRA(),
        IA3(),
        BitFit(),
        PrefixTuning(),
        PromptTuning(),
        MaM(),
        PromptPARA(),
        PARA(),
    )
}


def find_method(name: str) -> Method:
    """Raises UnknownMethodError with the known names."""
    if name not in METHODS:
        raise UnknownMethodError(f"unknown method '{name}'; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def new_adapter(
    method: Method,
    config: MethodConfig,
    model: LanguageModel,
    seed: int,
    task_embeddings: Tensor | None = None,
) -> Adapter:
    """A fresh float32 adapter, as `Method.initialise` says. Raises MissingSiteError or AdapterError."""
    require_sites(model.config.model_type, method.sites(config), method.name)
    _check_room(method, config, model)
    generator = torch.Generator().manual_seed(seed)
    parameters = method.initialise(config, FrozenModel(model), generator)
    if task_embeddings is not None:
        parameters[TASK_TOKENS] = task_embeddings[None]
    return Adapter(method, config, parameters)


def first_embeddings(words: Sequence[str | None], tokenizer: Tokenizer, model: LanguageModel) -> Tensor:
    """A beginning for task tokens: float32 [len(words), embedding width], each the mean of what stands for
    its words, or for the whole vocabulary if there are none."""
    frozen = FrozenModel(model)
    means = []
    for own in words:
        ids = range(frozen.vocab_size) if own is None else tokenizer.encode_continuation(f" {own}")
        if not ids or (own is not None and not own.strip()):  # the space in front may be a token
            raise AdapterError(f"a task token cannot begin as {own!r}: these are no words")
        means.append(frozen.embeddings(ids).mean(dim=0))
    return torch.stack(means)


def require_free_names(record: AdapterRecord, tokenizer: Tokenizer) -> None:
    """Raises AdapterError if the base model has a token of a task token's name."""
    for name in record.task_tokens:
        if tokenizer.knows(name):
            raise AdapterError(f"{name} is a token of the base model; a task token needs another name")


def reparametrised(fresh: Adapter, model: LanguageModel, seed: int) -> nn.Module | None:
    """What training steps instead of some of the parameters, as `Method.reparametrise` says."""
    generator = torch.Generator().manual_seed(seed)
    return fresh.method.reparametrise(fresh.config, fresh.parameters, FrozenModel(model), generator)


def load_adapter(
    artefact: Artefact,
    model: LanguageModel,
    *,
    allow_other_weights: bool = False,
    allow_all_positions: bool = False,
) -> Adapter:
    """Loads an artefact for `model`; a baseline trained on all positions only if that is allowed.

    Raises NotServableError, AdapterError (its configuration), BaseMismatchError, UnknownMethodError,
    ParameterMismatchError, or MissingSiteError.
    """
    record, fingerprint = artefact.record, model.fingerprint
    if not allow_all_positions:
        require_servable(record)
    if record.base.architecture != fingerprint.architecture:
        raise BaseMismatchError(
            f"trained for architecture [{record.base.architecture}], "
            f"the model is [{fingerprint.architecture}]"
        )
    if record.base.weights != fingerprint.weights and not allow_other_weights:
        raise BaseMismatchError(
            f"trained on weights {record.base.weights[:12]} ({record.base.name}), "
            f"the model's are {fingerprint.weights[:12]}"
        )
    method = find_method(record.method)
    config = method.configure(record.config)
    require_sites(model.config.model_type, method.sites(config), method.name)
    _check_room(method, config, model)
    if (virtual := method.virtual_tokens(config)) != record.virtual_tokens:
        raise AdapterError(
            f"virtual tokens: {virtual} in the configuration of {method.name}, "
            f"{record.virtual_tokens} in prad.json itself"
        )
    shapes = method.shapes(config, FrozenModel(model))
    if record.task_tokens:
        shapes[TASK_TOKENS] = (len(record.task_tokens), FrozenModel(model).embedding_width)
    expected = {file: shapes[name] for name in shapes for file in _file_names(name, model.num_layers)}
    for name, info in artefact.tensors.items():
        if info.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ParameterMismatchError(f"tensor {name}: expected one of {known}, the file has {info.dtype}")
    _check_shapes(expected, {name: info.shape for name, info in artefact.tensors.items()})
    stored = stored_parameters(artefact, shapes, model.num_layers)
    parameters = {name: p.to(model.device) for name, p in stored.items()}
    _check_numbers(_kept(parameters, model.dtype))
    adapter = prepared(Adapter(method, config, parameters), model)
    _check_numbers(adapter.parameters)
    return adapter


def prepared(adapter: Adapter, model: LanguageModel) -> Adapter:
    """The adapter as a pass applies it: its method's derived parameters, in dtypes as `kept_in` says."""
    parameters = adapter.method.prepare(adapter.config, adapter.parameters, FrozenModel(model))
    if TASK_TOKENS in adapter.parameters:
        parameters = parameters | {TASK_TOKENS: adapter.parameters[TASK_TOKENS]}
    return Adapter(adapter.method, adapter.config, _kept(parameters, model.dtype))


def stored_parameters(artefact: Artefact, names: Iterable[str], layers: int) -> Parameters:
    """What `save_parameters` wrote under these names, in the file's dtypes; its tensors must all be there."""
    tensors = load_file(artefact.weights)
    return {name: torch.stack([tensors[file] for file in _file_names(name, layers)]) for name in names}


def save_parameters(parameters: Parameters, folder: Path, dtype: torch.dtype) -> None:
    """Writes the weights file of an artefact, one tensor per layer and parameter; `dtype`: see `kept_in`."""
    tensors = {
        file: part.contiguous()
        for name, stacked in _kept(parameters, dtype).items()
        for file, part in zip(_file_names(name, len(stacked)), stacked.detach().cpu().unbind(0), strict=True)
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read


def _kept(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    return {name: p.to(kept_in(p, dtype)) for name, p in parameters.items()}


def _file_names(name: str, layers: int) -> list[str]:
    """What a file calls a parameter's parts along its first dimension."""
    return [name] if name.startswith(INPUT) else [f"layers.{i}.{name}" for i in range(layers)]


def _check_room(method: Method, config: MethodConfig, model: LanguageModel) -> None:
    virtual = method.virtual_tokens(config)
    if virtual + _LEAST_ROOM > model.max_context:
        raise AdapterError(
            f"{method.name}: {virtual} virtual tokens leave no room for a prompt and its output in the "
            f"model's context of {model.max_context}"
        )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ParameterMismatchError(
                f"tensor {name}: expected {expected.get(name, 'none')}, "
                f"the file has {found.get(name, 'none')}"
            )


def _check_numbers(parameters: Parameters) -> None:
    """As they are applied: what is finite in a file may not be so there."""
    for name, stacked in parameters.items():
        for file, parameter in zip(_file_names(name, len(stacked)), stacked, strict=True):
            if not parameter.isfinite().all():
                raise ParameterMismatchError(f"tensor {file}: expected finite numbers in {stacked.dtype}")
