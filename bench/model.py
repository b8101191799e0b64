"""The model that a benchmark measures."""

from pathlib import Path

import torch

from bench.flags import ModelFlags
from prad.core.models import Choice
from prad.lm import LanguageModel, dtype_name, load_served, resolve_model


def model_folder(arguments: ModelFlags) -> Path:
    return resolve_model(arguments.model, arguments.cache_dir)


def model_flags(arguments: ModelFlags) -> list[str]:
    """The same choice, for a service that a benchmark starts; on the CPU."""
    return ["--model", arguments.model, "--cache-dir", str(arguments.cache_dir), "--device", "cpu"]


def load(
    arguments: ModelFlags,
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    choice: Choice = "auto",
) -> LanguageModel:
    """In bf16 and with the kernels, as it is served, unless the benchmark says else. Most benchmarks know the
    CPU only: none of theirs waits for a GPU before it looks at the clock."""
    return load_served(
        arguments.model, arguments.cache_dir, dtype=dtype_name(dtype), device=device, kernels=choice
    ).model
