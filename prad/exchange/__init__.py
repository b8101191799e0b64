"""Adapters to and from PEFT's folders.

Conversion happens here and nowhere else: what is served is an artefact in our own layout.
"""

from prad.exchange.errors import ExchangeError, FieldError, TensorError
from prad.exchange.reading import import_folder
from prad.exchange.records import ImportSettings, how_base_is_known, was_prompt_only
from prad.exchange.writing import EXPORTED, export_folder

__all__ = [
    "EXPORTED",
    "ExchangeError",
    "FieldError",
    "ImportSettings",
    "TensorError",
    "export_folder",
    "how_base_is_known",
    "import_folder",
    "was_prompt_only",
]
