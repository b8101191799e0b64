"""Faster arithmetic for the CPU, where a C++ compiler is at hand; without one everything works on torch."""

import logging
from pathlib import Path

import torch

from prad.core.models import Choice, Precision
from prad.lm.kernels.build import DEFAULT_KEPT_BYTES, BuildError, built, installed
from prad.lm.kernels.calls import Calls, Kernels, Recording, view_of
from prad.lm.kernels.memory import HugePages
from prad.lm.kernels.operations import (
    Activation,
    Kind,
    LowRankSpan,
    Out,
    PagedView,
    PromptSpan,
    Weights,
)
from prad.lm.kernels.weights import PackedLinear, can_pack, can_pack_blocks

logger = logging.getLogger(__name__)


def load_kernels(
    choice: Choice, cache_dir: Path, device: str, kept_bytes: int = DEFAULT_KEPT_BYTES
) -> Kernels | None:
    """The kernels, with as many threads as torch has; None if torch is to compute. Raises BuildError.

    `kept_bytes`: of kernels compiled earlier for something else, which stay in `cache_dir`.
    """
    if choice == "torch" or (choice == "auto" and device != "cpu"):
        return None
    try:
        if device != "cpu":
            raise BuildError(f"the kernels compute on a CPU, not on {device}")
        return _installed() or _built(cache_dir, kept_bytes)
    except BuildError as error:
        if choice == "native":
            raise
        logger.warning("torch computes, slower than the kernels would: %s", error)
        return None


def _installed() -> Kernels | None:
    """None if there are none for this CPU, or this system cannot load them (an older C++ library)."""
    if (library := installed()) is None:
        return None
    try:
        return Kernels(library, torch.get_num_threads())
    except BuildError as error:
        logger.warning("%s: %s", library, error)
        return None


def _built(cache_dir: Path, kept_bytes: int) -> Kernels:
    library = built(cache_dir, kept_bytes)
    try:
        return Kernels(library, torch.get_num_threads())
    except BuildError as error:
        library.unlink(missing_ok=True)
        raise BuildError(f"{error}; the next start builds them anew") from error


__all__ = [
    "Activation",
    "BuildError",
    "Calls",
    "Choice",
    "HugePages",
    "Kernels",
    "Kind",
    "LowRankSpan",
    "Out",
    "PackedLinear",
    "PagedView",
    "Precision",
    "PromptSpan",
    "Recording",
    "Weights",
    "can_pack",
    "can_pack_blocks",
    "load_kernels",
    "view_of",
]
