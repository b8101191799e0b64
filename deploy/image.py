"""The image's last step as it is built: what a start imports is compiled, and the default model answers.

Whoever runs the image may not write into it: what nobody has imported here is compiled at every start.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from tempfile import TemporaryDirectory

import torch

SERVICES = ("adapter_registry.server", "decode_service.server", "prefill_service.server", "prad_cli.serve")
PACKAGES = (
    *("adapter_registry", "decode_service", "kvtransfer", "local_stack", "prad", "prad_cli"),
    "prefill_service",
)
FAMILIES = ("gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
"""As transformers names the modules of those in prad/lm/families.py."""


def import_everything() -> list[str]:
    """The services, the code of every family's models, and the commands; what of these needs an extra is left
    out, and named. Raises ModuleNotFoundError if what serving needs is missing."""
    for name in (*SERVICES, *(f"transformers.models.{each}.modeling_{each}" for each in FAMILIES)):
        import_module(name)
    left_out = []
    for package in PACKAGES:
        for module in walk_packages(import_module(package).__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                try:
                    import_module(module.name)
                except ModuleNotFoundError as error:
                    if (error.name or "").partition(".")[0] in PACKAGES:
                        raise
                    left_out.append(f"{module.name} ({error.name})")
    return left_out


def answer(prompt: str) -> str:
    """The default model's next token, computed as it is served. Raises ModelError."""
    from prad.lm import DEFAULT_MODEL, PackedBatch, Tokenizer, load_served

    with TemporaryDirectory() as cache:
        model, folder = load_served(DEFAULT_MODEL, Path(cache), dtype="bfloat16")
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode_prompt(prompt)
        with torch.inference_mode():
            logits = model.forward(PackedBatch.of_sequences([ids], kernels=model.kernels))
        if not torch.isfinite(logits).all():
            raise SystemExit("the default model's logits are not finite")
        return tokenizer.decode(model.argmax(logits))


if __name__ == "__main__":
    print("compiled; left out, since their extras are: " + ", ".join(import_everything()))
    print("the default model answers: " + repr(answer("The capital of France is")))
