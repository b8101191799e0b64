"""One stack for all tests from outside: a tiny float32 model that reads characters and speaks in turns, and
three tasks whose adapters do not fit in memory together.

Each test stands for a kind of fault that users of this or of other servers met, the latter with the numbers
of the public reports. Kinds that no HTTP request shows are tested where they belong: model files that lack
tensors in tests/lm, imported adapters of another base in tests/exchange, children of `prad serve` that end
in tests/cli.
"""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile
from transformers import PreTrainedTokenizerFast

from prad.lm import LanguageModel
from tests.conftest import EOS, SEEDS, RunningStack, StackMaker, random_artefact, random_model
from tests.outside.asking import LARGE, Outside

TURN = "<|turn|>"
CHAT = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}\n{% endfor %}<|turn|>assistant\n"
)


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one token per printable character, a special token that opens turns, and a chat
    template made of it, which writes tools as Hermes does."""
    folder = tmp_path_factory.mktemp("reading") / "reading"
    random_model("llama", SEEDS["llama"]).save_pretrained(folder)
    letters = [c for c in string.printable if c.isprintable() or c == "\n"]
    letters += [chr(0xC0 + i) for i in range(EOS - 1 - len(letters))]
    ids = {letter: i for i, letter in enumerate(letters)} | {TURN: EOS - 1, "</s>": EOS}
    tokenizer = TokenizerFile(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    # joins tokens as they stand; grammars of structured output know decoders with a fallback to bytes
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(TURN), AddedToken("</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_reading(reading_model: Path) -> LanguageModel:
    return LanguageModel.load(reading_model)


@pytest.fixture(scope="session")
def outside(
    reading_model: Path,
    load_reading: LanguageModel,
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Outside]:
    """Room for one adapter at prefill, and for four of the longest sequences at decode."""
    root = tmp_path_factory.mktemp("outside")
    for seed, name in enumerate(("red", "green", "blue"), start=1):
        random_artefact(root / "adapters" / name, load_reading, seed, r=LARGE)
    settings = {"adapters_mib": 1, "files_dir": root / "files"}
    with running_stack(reading_model, root / "adapters", root, prefill=settings, kv_cache_mib=1) as stack:
        yield Outside(stack)


@pytest.fixture
def make_adapter(load_reading: LanguageModel, tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(seed, **record)`: the folder of a new adapter, different for each seed."""

    def make(seed: int, **record: object) -> Path:
        return random_artefact(tmp_path / f"adapter-{seed}", load_reading, seed, r=LARGE, **record).folder

    return make


@pytest.fixture
def running(outside: Outside) -> RunningStack:
    return outside.stack
