"""A model as it is served: found, loaded, and with own kernels where they can be had."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from prad.core.models import Choice, Precision
from prad.lm.device import require_device
from prad.lm.errors import UnsupportedModelError
from prad.lm.kernels import load_kernels
from prad.lm.kernels.build import DEFAULT_KEPT_BYTES
from prad.lm.model import LanguageModel
from prad.lm.source import resolve_model

logger = logging.getLogger(__name__)


class ServedModel(NamedTuple):
    """`folder`: where it was loaded from, with its tokenizer."""

    model: LanguageModel
    folder: Path


def load_served(
    name: str,
    cache_dir: Path,
    *,
    dtype: str,
    device: str = "cpu",
    kernels: Choice = "auto",
    weights: Precision = "full",
    kept_bytes: int = DEFAULT_KEPT_BYTES,
) -> ServedModel:
    """The model of a name as in `resolve_model`, in bfloat16 or float32; `kernels` and `kept_bytes` as in
    `load_kernels`.

    Raises ModelError if there is none, or not with these weights, or not on this machine.
    """
    require_device(device)  # before a model is fetched or converted
    folder = resolve_model(name, cache_dir)
    model = LanguageModel.load(folder, dtype=getattr(torch, dtype), device=device)
    found = load_kernels(kernels, cache_dir, device, kept_bytes)
    if found is not None:
        model.accelerate(found, weights)
        logger.info("the kernels compute %s", "all of the model" if model.is_fused else "its attention")
    elif weights != "full":
        raise UnsupportedModelError(
            f"{weights} weights need the kernels, and these are not in use: install a C++ compiler (g++) and "
            "use neither --kernels torch nor --device cuda, or use --weights full"
        )
    return ServedModel(model, folder)
