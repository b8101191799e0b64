"""A Llama with its channels in another order: the same model, whose weights lie in other blocks of 32."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prad.lm import LanguageModel
from prad.lm.blocks import share_in_blocks


def with_made_blocks(model: LanguageModel, folder: Path) -> LanguageModel | None:
    """In 4-bit blocks that are made of its weights; reordered, since those of a file's blocks, as they lie,
    would be the file's again. None if `folder`, the model's, has no file's blocks, so that 4 bits are made
    anyway, or for another family than Llama, or one with biases, or without kernels."""
    config = model.config
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if model.kernels is None or config.model_type != "llama" or biased or not share_in_blocks(folder):
        return None
    other = reordered(model)
    other.accelerate(model.kernels, "int4")
    return other


def reordered(model: LanguageModel) -> LanguageModel:
    """A Llama's, without biases: the channels between its layers and inside its FFNs are shuffled, with every
    weight that reads or writes them; heads are as they were, so that keys and values are the same, and with
    them what the output projections read. It has no blocks of a file's: what it is rounded to is made of its
    weights, as for any model that comes without."""
    module: Any = copy.deepcopy(model.module)
    random = torch.Generator().manual_seed(0)
    config = module.config
    width, inner = (
        torch.randperm(n, generator=random) for n in (config.hidden_size, config.intermediate_size)
    )

    body, head = module.model, module.lm_head
    tied = head.weight is body.embed_tokens.weight
    _put(body.embed_tokens, body.embed_tokens.weight[:, width])
    _put(head, body.embed_tokens.weight if tied else head.weight[:, width])
    _put(body.norm, body.norm.weight[width])
    for layer in body.layers:
        attention, ffn = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _put(norm, norm.weight[width])
        for reading in (attention.q_proj, attention.k_proj, attention.v_proj):
            _put(reading, reading.weight[:, width])
        for reading in (ffn.gate_proj, ffn.up_proj):
            _put(reading, reading.weight[inner][:, width])
        _put(attention.o_proj, attention.o_proj.weight[width])
        _put(ffn.down_proj, ffn.down_proj.weight[width][:, inner])
    return LanguageModel(module, f"{model.fingerprint.weights} in another order")


def _put(layer: nn.Module, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
