"""What serving does not need comes with an extra: a command asks for it before it loads anything."""

from importlib.util import find_spec

from prad.core.errors import PradError


class MissingExtraError(PradError):
    """A command's packages are not installed."""


def require_extra(extra: str, *modules: str) -> None:
    """Raises MissingExtraError, with what to type, unless all `modules` of the extra are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{' and '.join(missing)} {verb} not installed; run: pip install -e '.[{extra}]' (in a checkout)"
        )
