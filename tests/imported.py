"""What the services and commands of `prad` import, for the process that `tests.forked` forks them from."""

import os
from importlib import import_module

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `prad` does, before torch loads
os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported

MODULES = (
    "prad_cli.app",
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

for name in MODULES:
    import_module(name)
for name in LATER:
    getattr(import_module("transformers"), name)
for name in FAMILIES:
    import_module(f"transformers.models.{name}.modeling_{name}")
