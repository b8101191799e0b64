"""Tiny random models of any family, for the tests of the frozen model."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prad.lm import LanguageModel, PackedBatch

VOCAB = 120
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": VOCAB - 1,
    "bos_token_id": None,
    "pad_token_id": None,
}


def save_random(config: Any, folder: Path) -> Path:
    """A float32 model whose attention is not flat."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    module.save_pretrained(folder)
    return folder


def packed_logits(model: LanguageModel, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Each sequence's logits at every token, from one packed pass."""
    lengths = [len(s) for s in sequences]
    with torch.inference_mode():
        every = model.forward(PackedBatch.of_sequences(sequences, logit_rows=range(sum(lengths))))
    return list(every.split(lengths))


def eager_logits(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The same from transformers' own eager attention, one sequence at a time."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return [module.eval()(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]


def some_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB - 1, (length,), generator=generator).tolist()


def byte_level_tokenizer(folder: Path) -> Path:
    """A byte-level BPE with hardly any merges: most characters beyond ASCII are several tokens."""
    bpe = Tokenizer(token_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat and then the other cat"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    return folder
