"""Which exceptions are a person's to mend, and so are shown as one line instead of a traceback."""

import sys

_ROOTS = {
    "prad.adapters.errors": "AdapterError",
    "prad.artefact.files": "ArtefactError",
    "prad.exchange.errors": "ExchangeError",
    "prad.lm.errors": "ModelError",
    "prad.training.data": "DataError",
    "prad.training.served": "ServerError",
    "prad_cli.extras": "MissingExtraError",
    "local_stack.stack": "StackError",
    "decode_service.server": "DecodeError",
    "prefill_service.server": "CannotStartError",
    "adapter_registry.errors": "RegistryError",
    "bench.peer": "PeerError",
}


def known_errors() -> tuple[type[Exception], ...]:
    """The roots of our exception trees, as far as their modules were imported: others cannot have risen."""
    return tuple(getattr(sys.modules[m], name) for m, name in _ROOTS.items() if m in sys.modules)
