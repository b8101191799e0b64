"""Tiny random float32 models, adapters with weight on every parameter, and the real stack in processes."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from local_stack.pushing import push_all
from local_stack.stack import Stack, answers
from prad.adapters import find_method, new_adapter, save_parameters
from prad.adapters.method import FrozenModel
from prad.artefact import AdapterRecord, Artefact, BaseModelRef, read_artefact, write_record
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels, load_kernels
from prad.lm.kernels.build import built
from tests import forked
from tests.cache import CACHE

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of ours
hypothesis.settings.register_profile(  # `make test-long`; in CI Hypothesis would draw the same every time
    "thorough", deadline=None, max_examples=1000, derandomize=False, print_blob=True
)
torch.set_num_threads(1)  # tiny models: threads that wait for each other cost more than they do

VOCAB = 120
EOS = VOCAB - 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
GROUPED = {"intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, **GROUPED),
    "gpt2": lambda: GPT2Config(**SIZES, num_attention_heads=4, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SIZES, **GROUPED, sliding_window=24),
    "qwen3": lambda: Qwen3Config(**SIZES, **GROUPED, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        **GROUPED,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=24,
        layer_types=_WINDOWS,
        pad_token_id=None,
    ),
    "opt": lambda: OPTConfig(**SIZES, num_attention_heads=4, ffn_dim=80, pad_token_id=None),
    "gpt-neox": lambda: GPTNeoXConfig(
        **SIZES,
        num_attention_heads=4,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ),
}
SEEDS = {"llama": 1, "gpt2": 1, "mistral": 4, "qwen3": 1, "gemma3": 12, "opt": 1, "gpt-neox": 1}

LONGEST = (
    "tests/cli/test_serve_command.py",
    "tests/stack/test_routing_under_traffic.py",
    "tests/stack/test_demo.py",
    "tests/training/test_train_interrupted.py",
    "tests/oracle/test_oracle.py",
    "tests/stack/test_redis_shared.py",
    "tests/training/test_train.py",
)
"""Files whose tests take half a minute or more, from the longest on."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the services of a running stack compute")
    parser.addoption("--fork", action="store_true", help="services and commands: see tests/forked.py")


def pytest_configure(config: pytest.Config) -> None:
    global _device
    _stand_alone()
    _device = config.getoption("--device")
    if not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("untimed")
    forked.wanted = config.getoption("--fork") and _device == "cpu"  # what CUDA began no fork can go on with
    if not config.getoption("numprocesses", None):  # a worker of xdist, or the only process
        gc.disable()  # until all tests are collected
        if forked.wanted:
            forked.begin()
    config.option.loadscopereorder = False  # in the order of `pytest_collection_modifyitems` instead


def _stand_alone() -> None:
    """What tests and the commands that they start find; at no import, which `tests.outside.clients` needs as
    well, whose pip has the user's certificates and proxy."""
    os.environ["PRAD_CACHE_DIR"] = str(CACHE)
    # ignored here, children would not heed them: the first in a script's background job, the other in nohup
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # also where a proxy leads out
    os.environ.pop("SSL_CERT_FILE", None)  # each client of HTTP would read all those certificates, for nobody
    os.environ["SSL_CERT_DIR"] = str(CACHE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: whoever works at the last long file alone is waited for by all."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish() -> None:
    """What is there now stays. Looking through it was a quarter of what the tests computed."""
    gc.freeze()
    gc.enable()


_device = "cpu"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes (once) a model folder of a family: random float32 weights, one token per word "t<id>"."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.is_dir():
            save_model(random_model(family, SEEDS[family]), folder)
        return folder

    return make


def random_model(family: str, seed: int) -> Any:
    """A tiny model far from initialisation: attention that is not flat, biases and norms with weight, tokens
    of unequal loudness, so that almost every step has a clear winner."""
    return randomised(CONFIGS[family](), seed)


def randomised(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape))
            elif "wpe" not in name and "embed_positions" not in name:
                weight.mul_(3.0)
        model.get_output_embeddings().weight.mul_(torch.randn(VOCAB, 1).exp())
    return model


def save_model(module: Any, folder: Path) -> None:
    """With a tokenizer of one token per word."""
    module.save_pretrained(folder)
    _word_tokenizer().save_pretrained(folder)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{i}": i for i in range(EOS)} | {"</s>": EOS}
    tokenizer = TokenizerFile(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="t0")


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Needs a C++ compiler."""
    found = load_kernels("native", CACHE, "cpu")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def load_tiny(tiny_model: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    loaded: dict[str, LanguageModel] = {}

    def load(family: str) -> LanguageModel:
        if family not in loaded:
            loaded[family] = LanguageModel.load(tiny_model(family), dtype=torch.float32)
        return loaded[family]

    return load


def random_artefact(
    folder: Path,
    model: LanguageModel,
    seed: int,
    *,
    method: str = "prad-pa",
    r: int = 8,
    config: dict[str, Any] | None = None,
    **record: Any,
) -> Artefact:
    """An adapter folder whose every parameter has weight, large enough to change what the model says.

    `config`: the method's settings; {"r": r} if left out.
    """
    folder.mkdir(parents=True)
    adapter_method = find_method(method)
    settings = adapter_method.configure({"r": r} if config is None else config)
    names = record.get("task_tokens", ())
    table = torch.zeros(len(names), FrozenModel(model).embedding_width) if names else None
    adapter = new_adapter(adapter_method, settings, model, seed, table)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters.values():
        if parameter.dim() == 2 and parameter.any():  # a factor that starts at one, or at a norm
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.normal_(0.0, 0.3, generator=generator)
    save_parameters(adapter.parameters, folder, torch.float32)
    base = BaseModelRef(
        name="tiny", architecture=model.fingerprint.architecture, weights=model.fingerprint.weights
    )
    fields = settings.model_dump(mode="json")
    record = {"virtual_tokens": adapter.virtual_tokens} | record
    write_record(folder, AdapterRecord(method=method, config=fields, base=base, **record))
    return read_artefact(folder)


@dataclass(frozen=True)
class RunningStack:
    """The real processes: a client of the API, and where the others listen."""

    api: httpx.Client
    registry: str
    decode: str
    stack: Stack


StackMaker = Callable[..., AbstractContextManager[RunningStack]]


@pytest.fixture(scope="session")
def running_stack(unused_tcp_port_factory: Callable[[], int]) -> StackMaker:
    """`running_stack(model, adapters, root, ...)`: see `_running_stack`."""
    return partial(_running_stack, unused_tcp_port_factory)


@contextmanager
def _running_stack(
    unused_port: Callable[[], int],
    model: Path,
    adapters: Path | None,
    root: Path,
    *,
    decode_model: Path | None = None,
    followed: str | None = None,
    kernels: str = "native",
    prefill: Mapping[str, Any] = MappingProxyType({}),
    **decode: Any,
) -> Iterator[RunningStack]:
    """The real processes on free ports, in float32. On another device than the CPU torch computes, whatever
    `kernels` says.

    `adapters`: a folder of adapter folders, pushed as tasks of their names. `prefill` and `decode`: their
    settings; `decode_model`: another model for decode, with which prefill never gets ready; `followed`: the
    registry of another stack, instead of one of its own.
    """
    api_port, registry_port, decode_port = (unused_port() for _ in range(3))
    api, registry = f"http://127.0.0.1:{api_port}", followed or f"http://127.0.0.1:{registry_port}"
    (root / "cache").mkdir()
    common = ["--dtype", "float32", "--cache-dir", str(root / "cache"), "--threads", "1"]
    if _device != "cpu":
        common += ["--device", _device, "--kernels", "torch"]
    else:
        (root / "cache" / "kernels").symlink_to(built(CACHE).parent)  # compiled once for all tests
        common += ["--kernels", kernels]
    with forked.stack(root / "logs") as stack:
        if followed is None:
            stack.start("registry", ["--port", str(registry_port), "--data-dir", str(root / "registry")])
        own = ["--model", str(decode_model or model), "--port", str(decode_port)]
        stack.start("decode", [*common, *own, *_flags(decode)])
        where = ["--decode", f"127.0.0.1:{decode_port}", "--registry", registry, "--port", str(api_port)]
        stack.start("prefill", [*common, "--model", str(model), *where, *_flags(prefill)])
        stack.wait_until(lambda: answers(f"{registry}/ready"), "the registry")
        if decode_model is None:
            stack.wait_until(lambda: answers(f"{api}/ready"), "prefill")
        if adapters is not None:
            assert push_all(adapters, registry) == {}
            listed = [f"{api}/v1/models/{path.name}" for path in adapters.iterdir()]
            stack.wait_until(lambda: all(map(answers, listed)), "the adapters")
        with httpx.Client(base_url=api, timeout=60) as client:
            yield RunningStack(client, registry, f"127.0.0.1:{decode_port}", stack)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
