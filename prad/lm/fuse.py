"""From transformers' modules to the fused model, once, when a model is loaded: weights packed, sizes read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prad.lm.blocks import Bits, Blocks
from prad.lm.fused import FusedModel, Layer, Norm, Rotary, Shape
from prad.lm.kernels import Activation, HugePages, Kernels, PackedLinear, Precision, can_pack, can_pack_blocks
from prad.lm.support import max_context

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
_MOST_HEAD_DIM = 512  # rows.h
_PLAIN_ROPE = {"default", "linear", "llama3", "yarn"}  # the others change with the longest sequence of a pass


def fuse(
    module: Any, kernels: Kernels, precision: Precision, blocks: Mapping[str, Blocks]
) -> FusedModel | None:
    """The fused form of a transformers model on the CPU; None if its family or sizes are not covered.

    blocks: what parameters are made of, for int4.
    """
    make = {"llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "gpt2": _gpt2}
    family = make.get(module.config.model_type)
    if family is None or module.device.type != "cpu":
        return None
    if module.dtype not in ((torch.bfloat16, torch.float32) if precision == "full" else (torch.bfloat16,)):
        return None
    if not can_pack([p.T if _is_conv(m) else p for m, p in _linear_weights(module)], precision):
        return None
    named = dict(module.named_parameters(remove_duplicate=False))
    known = {id(named[name]): each for name, each in blocks.items()}
    return family(module, kernels, _Packing(precision, HugePages(), known, module.lm_head))


@dataclass(frozen=True, slots=True)
class _Packing:
    precision: Precision
    memory: HugePages
    blocks: Mapping[int, Blocks]
    """Of parameters, by id."""
    head: nn.Module

    def of(self, modules: list[Any], paired: bool = False) -> PackedLinear:
        """Several projections of the same input as one."""
        weights = [m.weight.T if _is_conv(m) else m.weight for m in modules]
        biases = [
            w.new_zeros(len(w)) if m.bias is None else m.bias for m, w in zip(modules, weights, strict=True)
        ]
        bias = None if all(m.bias is None for m in modules) else torch.cat(biases)
        if self.precision == "int4":
            blocks = self._blocks(modules, weights, paired)
            return PackedLinear.of_blocks(blocks, bias, paired=paired, memory=self.memory)
        return PackedLinear.of(
            torch.cat(weights), bias, precision=self.precision, paired=paired, memory=self.memory
        )

    def _blocks(self, modules: list[Any], weights: list[Tensor], paired: bool) -> list[Blocks]:
        """The file's own; what it has none of is rounded: to 4 bits, the head and what is beside 8 bits to 8,
        as in ggml's files. What cannot lie side by side as it is, all of it to 8."""
        kept = [self.blocks.get(id(m.weight)) for m in modules]
        eight = self.head in modules or any(each is not None and each.bits == 8 for each in kept)
        bits: Bits = 8 if eight else 4
        blocks = [each or Blocks.rounded(w, bits) for each, w in zip(kept, weights, strict=True)]
        if can_pack_blocks(blocks, paired=paired):
            return blocks
        return [Blocks.rounded(weight, 8) for weight in weights]


def _llama(module: Any, kernels: Kernels, packing: _Packing) -> FusedModel | None:
    config, model = module.config, module.model
    head_dim = model.layers[0].self_attn.head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    if config.hidden_act not in _ACTIVATIONS or rope.get("rope_type") not in _PLAIN_ROPE:
        return None
    if model.rotary_emb.inv_freq.numel() * 2 != head_dim or head_dim > _MOST_HEAD_DIM:
        return None

    def layer(index: int) -> Layer:
        block = model.layers[index]
        attention, ffn = block.self_attn, block.mlp
        normed = hasattr(attention, "q_norm")
        window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        return Layer(
            Norm.of(block.input_layernorm),
            packing.of([attention.q_proj, attention.k_proj, attention.v_proj]),
            packing.of([attention.o_proj]),
            Norm.of(block.post_attention_layernorm),
            packing.of([ffn.gate_proj, ffn.up_proj], paired=True),
            packing.of([ffn.down_proj]),
            (Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if normed else None,
            attention.scaling,
            window,
        )

    kv_heads = config.num_key_value_heads
    return FusedModel(
        Shape(
            config.num_attention_heads,
            kv_heads,
            head_dim,
            config.intermediate_size,
            True,
            _ACTIVATIONS[config.hidden_act],
        ),
        model.embed_tokens.weight,
        None,
        Rotary(model.rotary_emb.inv_freq.float(), model.rotary_emb.attention_scaling),
        tuple(map(layer, range(config.num_hidden_layers))),
        Norm.of(model.norm),
        packing.of([module.lm_head]),
        kernels,
        packing.precision,
        max_context(config),
    )


def _gpt2(module: Any, kernels: Kernels, packing: _Packing) -> FusedModel | None:
    config, model = module.config, module.transformer
    if config.activation_function not in _ACTIVATIONS or config.add_cross_attention:
        return None

    def layer(block: Any) -> Layer:
        return Layer(
            Norm.of(block.ln_1),
            packing.of([block.attn.c_attn]),
            packing.of([block.attn.c_proj]),
            Norm.of(block.ln_2),
            packing.of([block.mlp.c_fc]),
            packing.of([block.mlp.c_proj]),
            None,
            block.attn.scaling,
            None,
        )

    heads = config.num_attention_heads
    ffn = config.n_inner or 4 * config.hidden_size
    return FusedModel(
        Shape(
            heads, heads, config.hidden_size // heads, ffn, False, _ACTIVATIONS[config.activation_function]
        ),
        model.wte.weight,
        model.wpe.weight,
        None,
        tuple(map(layer, model.h)),
        Norm.of(model.ln_f),
        packing.of([module.lm_head]),
        kernels,
        packing.precision,
        max_context(config),
    )


def _is_conv(module: Any) -> bool:
    """GPT-2 keeps its weights [in, out]."""
    return type(module).__name__ == "Conv1D"


def _linear_weights(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    return [(m, m.weight) for m in module.modules() if isinstance(m, nn.Linear) or _is_conv(m)]
