"""A tiny model whose tokens are letters: for grammars, which look at the text that tokens make."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import EOS, VOCAB

_LETTERS = [*map(chr, range(0x21, 0x7F)), "Ġ", "Ċ"]  # byte-level names of space and newline
_MERGES = (
    't r, tr u, tru e, f a, fa l, fal s, fals e, n u, nu l, nul l, Ġ a, Ġ b, " :, { ", 1 2, 3 4, a b, o k, '
    "e s, i n, r e, a n, o n"
)
_TALK = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def lettered(model: Path, folder: Path) -> Path:
    """A copy of a tiny model's folder, with such a tokenizer."""
    merges = [(left, right) for left, right in (pair.split() for pair in _MERGES.split(", "))]
    names = [*_LETTERS, *(left + right for left, right in merges), "</s>"]
    assert len(names) == VOCAB
    assert names[EOS] == "</s>"
    bpe = TokenizerFile(models.BPE({name: i for i, name in enumerate(names)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    shutil.copytree(model, folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=_TALK)
    fast.save_pretrained(folder)
    return folder
