"""Prefix and prompt tuning: PEFT keeps both as one matrix `prompt_embeddings`, a row per virtual token.

prompt tuning  [n, width]: what stands in the place of embeddings, and so is as wide as they are.
prefix tuning  [n, layers · 2 · kv_heads · dim]: by layer keys, as they are cached (after RoPE), then values;
a projection through which it was trained is already applied in the file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prad.adapters.method import Parameters
from prad.exchange.errors import ExchangeError, TensorError
from prad.exchange.exported import Exported
from prad.exchange.imported import Imported
from prad.exchange.modules import Modules
from prad.exchange.peft_config import PrefixSource, PromptSource, VirtualTokensSource

EMBEDDINGS = "prompt_embeddings"
KEY, VALUE, INPUT = "prefix.key", "prefix.value", "input.embedding"


def import_prompt(config: PromptSource, tensors: Mapping[str, Tensor], modules: Modules) -> Imported:
    """Raises TensorError."""
    embedding, width = modules.embedding
    matrix = _matrix(config, tensors, width, f"as wide as {embedding}, {_of(modules)}")
    count = config.num_virtual_tokens
    return Imported("prad-prompt", {"virtual_tokens": count}, {INPUT: matrix.unsqueeze(0)}, count)


def import_prefix(config: PrefixSource, tensors: Mapping[str, Tensor], modules: Modules) -> Imported:
    """Raises TensorError, or ExchangeError for a model whose layers differ."""
    layers, heads, dim = _cached(modules)
    count = config.num_virtual_tokens
    matrix = _matrix(config, tensors, layers * 2 * heads * dim, _of(modules))
    both = matrix.view(count, layers, 2, heads, dim).transpose(0, 1)  # [layers, n, 2, heads, dim]
    parameters = {KEY: both[:, :, 0].contiguous(), VALUE: both[:, :, 1].contiguous()}
    return Imported("prad-prefix", {"virtual_tokens": count, "projection": None}, parameters, count)


def export_prompt(parameters: Parameters, modules: Modules) -> Exported:
    (matrix,) = parameters[INPUT]
    config = modules.model.config
    fields = {
        "peft_type": "PROMPT_TUNING",
        "num_attention_heads": config.num_attention_heads,
        "token_dim": matrix.shape[1],
    }
    return _exported(fields, matrix, modules)


def export_prefix(parameters: Parameters, modules: Modules) -> Exported:
    """Raises ExchangeError for a model whose layers differ."""
    layers, heads, dim = _cached(modules)
    both = torch.stack([parameters[KEY], parameters[VALUE]], dim=1)  # [layers, 2, n, heads, dim]
    matrix = both.permute(2, 0, 1, 3, 4).reshape(both.shape[2], layers * 2 * heads * dim)
    fields = {
        "peft_type": "PREFIX_TUNING",
        "encoder_hidden_size": heads * dim,
        "num_attention_heads": heads,
        "prefix_projection": False,
        "token_dim": heads * dim,
    }
    return _exported(fields, matrix, modules)


def _exported(fields: dict[str, Any], matrix: Tensor, modules: Modules) -> Exported:
    more = {
        "num_layers": modules.model.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(matrix),
    }
    return Exported(fields | more, {EMBEDDINGS: matrix.contiguous()})


def _matrix(config: VirtualTokensSource, tensors: Mapping[str, Tensor], width: int, why: str) -> Tensor:
    for name in sorted(tensors.keys() - {EMBEDDINGS}):
        raise TensorError(name, f"{EMBEDDINGS} only", "this one")
    found = tuple(tensors[EMBEDDINGS].shape) if EMBEDDINGS in tensors else "none"
    expected = (config.num_virtual_tokens, width)
    if found != expected:
        raise TensorError(EMBEDDINGS, expected, found, f"{config.peft_type}: {why}")
    return tensors[EMBEDDINGS]


def _of(modules: Modules) -> str:
    return f"for a model [{modules.model.fingerprint.architecture}]"


def _cached(modules: Modules) -> tuple[int, int, int]:
    """Layers, KV heads and their dimension, the same in all layers and for keys and values."""
    layers = modules.model.layout.layers
    shapes = {(layer.heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)}
    if len(shapes) > 1:
        raise ExchangeError(
            "PEFT's prefix has one shape for all layers' keys and values, this "
            f"'{modules.model.config.model_type}' model several: "
            f"{', '.join(f'{heads} x {dim}' for heads, dim in sorted(shapes))}"
        )
    heads, dim = shapes.pop()
    return len(layers), heads, dim
