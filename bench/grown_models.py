"""Random Llamas of other sizes than the default model: their steps take what those of trained ones take."""

from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prad.lm import LanguageModel, attention
from prad.lm.kernels import Kernels


class Size(NamedTuple):
    """Of a Llama, as its config names them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 49152


SIZES = {
    "tiny": Size(192, 2, 3, 1, 512, 4096),
    "small": Size(256, 3, 4, 2, 768, 4096),
    "135M": Size(576, 30, 9, 3, 1536),
    "360M": Size(960, 32, 15, 5, 2560),
    "1B": Size(2048, 16, 32, 8, 8192),
    "8B": Size(4096, 32, 32, 8, 14336, 128256),
}


def random_llama(size: str, kernels: Kernels | None = None, device: str = "cpu") -> LanguageModel:
    """In bf16, with embeddings that are the head's; made where it computes."""
    config = LlamaConfig(**SIZES[size]._asdict(), tie_word_embeddings=True, max_position_embeddings=8192)
    attention.register()
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.NAME
        )
    model = LanguageModel(module, f"random {size}")
    if kernels is not None:
        model.accelerate(kernels)
    return model
