"""What serving does not need comes with an extra: a command asks for it before it loads anything."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from prad.core.errors import PradError


class MissingExtraError(PradError):
    """A command's packages are not installed."""


def require_extra(extra: str, *modules: str) -> None:
    """Raises MissingExtraError, with what to type, unless all `modules` of the extra are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f"{' and '.join(missing)} {verb} not installed; run: {installing(extra)}")


def installing(extra: str) -> str:
    """For this interpreter, whose `pip` need not be the one that the shell finds, and from any folder."""
    pip = f"{shlex.quote(sys.executable)} -m pip install -e"
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"{pip} {shlex.quote(f'{checkout}[{extra}]')}"
    return f"{pip} '.[{extra}]' (in a checkout)"
