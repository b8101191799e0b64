"""What can go wrong with a frozen model, before a request ever reaches it."""

from prad.core.errors import PradError


class ModelError(PradError):
    """Base of everything `prad.lm` raises on purpose."""


class ModelNotFoundError(ModelError):
    """The named model is not a folder, a `.gguf` file, or a reachable Hugging Face id."""


class DeviceError(ModelError):
    """The named device is none, or not on this machine."""


class UnsupportedModelError(ModelError):
    """The model computes something that plain K and V per layer cannot express."""


class MissingSiteError(ModelError):
    """An adapter wants a site that this model family does not have."""


class GrammarError(ModelError):
    """A grammar does not compile, or takes more than it may; the message is the library's."""


class ChatTemplateError(ModelError):
    """The model's chat template refuses a conversation, or stumbles over it; the message is its own."""
