"""PrAd: adapters that act on the prompt only, one frozen model for hundreds of tasks.

As a library, with plain transformers: `from prad import PromptAdapter, model_folder` (see `prad.generation`).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"PromptAdapter": "prad.generation", "model_folder": "prad.generation"}
"""Imported when they are asked for: whoever wants the version waits for no torch."""


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
