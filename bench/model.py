"""The model that a benchmark measures."""

from pathlib import Path

from bench.flags import ModelFlags
from prad.lm import LanguageModel, resolve_model
from prad.lm.kernels import load_kernels


def model_folder(arguments: ModelFlags) -> Path:
    return resolve_model(arguments.model, arguments.cache_dir)


def model_flags(arguments: ModelFlags) -> list[str]:
    """The same choice, for a service that a benchmark starts; on the CPU."""
    return ["--model", arguments.model, "--cache-dir", str(arguments.cache_dir), "--device", "cpu"]


def load(arguments: ModelFlags, device: str = "cpu") -> LanguageModel:
    """In bf16 and with the kernels, as it is served. Most benchmarks know the CPU only: none of theirs waits
    for a GPU before it looks at the clock."""
    model = LanguageModel.load(model_folder(arguments), device=device)
    kernels = load_kernels("auto", arguments.cache_dir, device)
    if kernels is not None:
        model.accelerate(kernels)
    return model
