"""The PrAd methods: adapters that act on the prompt only, many at once in a packed pass."""

from prad.adapters.adaptation import AdaptedSpan, Adapter, PromptAdaptation, split_task_tokens
from prad.adapters.errors import (
    AdapterError,
    BaseMismatchError,
    ParameterMismatchError,
    UnknownMethodError,
)
from prad.adapters.loading import (
    METHODS,
    find_method,
    first_embeddings,
    load_adapter,
    new_adapter,
    prepared,
    reparametrised,
    require_free_names,
    save_parameters,
    stored_parameters,
)
from prad.artefact import placeholders

__all__ = [
    "METHODS",
    "AdaptedSpan",
    "Adapter",
    "AdapterError",
    "BaseMismatchError",
    "ParameterMismatchError",
    "PromptAdaptation",
    "UnknownMethodError",
    "find_method",
    "first_embeddings",
    "load_adapter",
    "new_adapter",
    "placeholders",
    "prepared",
    "reparametrised",
    "require_free_names",
    "save_parameters",
    "split_task_tokens",
    "stored_parameters",
]
