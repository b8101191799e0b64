"""What can be wrong with an adapter for the model at hand."""

from prad.core.errors import PradError


class AdapterError(PradError):
    """An adapter that cannot be used with this model; the message says what was found and expected."""


class UnknownMethodError(AdapterError):
    """The artefact names a method that this version does not have."""


class BaseMismatchError(AdapterError):
    """The adapter was trained on another architecture or other weights."""


class ParameterMismatchError(AdapterError):
    """The weights' names, shapes, dtypes or numbers are not those of the method on this model."""
