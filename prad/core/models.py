"""What settings and flags say about a model, known without loading one."""

from pathlib import Path
from typing import Literal

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What others call the default model: its id at Hugging Face."""

Choice = Literal["auto", "native", "torch"]
"""Own kernels where they can be built, own kernels or an error, or no own kernels."""

Precision = Literal["full", "int8", "int4"]
"""Of linear layers' weights: the model's own, rounded to 8 bits, or in blocks of 4 or 8 bits that share a
scale: those of the model's file where it has any."""


def served_name(name: str) -> str:
    """The id under which the API lists a model: the last part of its name, without a `.gguf` ending."""
    return Path(name).name.removesuffix(".gguf")
