"""Tiny `.gguf` files of the Llama family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from k_blocks import rounded
from tokenizers import pre_tokenizers

WORDS = ["<|end|>", "<|turn|>", "<|message|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Sizes:
    hidden: int = 32
    ffn: int = 64
    heads: int = 2
    kv_heads: int = 2
    layers: int = 2


SMALL = Sizes()


def tensors(sizes: Sizes = SMALL, spread: float = 1.0) -> Tensors:
    """By the names of a `.gguf` file."""
    draw = np.random.default_rng(0)
    hidden, kv = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(WORDS), hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(sizes.layers):
        for name, shape in {
            **{f"attn_{part}": (hidden, hidden) for part in ("q", "output")},
            **{f"attn_{part}": (kv, hidden) for part in ("k", "v")},
            **{f"ffn_{part}": (sizes.ffn, hidden) for part in ("gate", "up")},
            "ffn_down": (hidden, sizes.ffn),
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    return {
        name: (draw.normal(size=shape) * (spread if len(shape) > 1 else 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    held: Tensors,
    sizes: Sizes = SMALL,
    kinds: Mapping[str, str] | None = None,
    **more: Callable[[GGUFWriter], None],
) -> Path:
    """kinds: what tensors are rounded to, by ggml's names; the others are kept in float32."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    for add in more.values():
        add(writer)
    for name, tensor in held.items():
        if kind := (kinds or {}).get(name):
            writer.add_tensor(name, rounded(tensor, kind), raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
