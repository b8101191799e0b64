"""What the services and commands of `prad` import, for the process that `tests.forked` forks them from.

What cannot be imported is noted, and said by every command that would be forked: the forkserver itself passes
over an ImportError, and ends without a word at anything else.
"""

import gc
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `prad` does, before torch loads
os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported

MODULES = (
    "prad_cli.ready",
    "adapter_registry.server",
    "decode_service.server",
    "prefill_service.server",
    "prad.training.evaluate",
    "tests.forked",
)
LATER = (
    "AttentionInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "PreTrainedTokenizerFast",
)
"""What transformers imports when it is first asked for."""
FAMILIES = ("gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen3")
FAILED: dict[str, str] = {}
"""By what could not be imported: why."""


def _tried(name: str, read: Callable[[], object]) -> None:
    try:
        read()
    except Exception as error:  # whatever it is: a command that is forked says it
        FAILED[name] = f"{type(error).__name__}: {error}"


def _of_transformers(name: str) -> object:
    return getattr(import_module("transformers"), name)


def _commands() -> None:
    """Which `prad` imports when they are asked for."""
    for place in import_module("prad_cli.app")._PLACES.values():
        import_module(f"prad_cli.{place.partition('.')[0]}")


_tried("the commands", _commands)
for name in MODULES:
    _tried(name, partial(import_module, name))
for name in LATER:
    _tried(f"transformers.{name}", partial(_of_transformers, name))
for name in (f"transformers.models.{family}.modeling_{family}" for family in FAMILIES):
    _tried(name, partial(import_module, name))
gc.freeze()  # what all of them have is looked through by none, and stays one copy in memory
