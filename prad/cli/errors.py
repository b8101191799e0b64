"""Which exceptions are a person's to mend, and so are shown as one line instead of a traceback."""


def known_errors() -> tuple[type[Exception], ...]:
    """The roots of our exception trees; imported late, for they pull in torch."""
    from prad.adapters import AdapterError
    from prad.artefact import ArtefactError
    from prad.lm import ModelError
    from prad.training.data import DataError

    return (AdapterError, ArtefactError, ModelError, DataError)
