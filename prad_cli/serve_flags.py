"""Which values `prad serve` gives its services, and which it leaves to their variables in the environment."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import typer

_COMPUTING = ("PREFILL", "DECODE")


def shared_option(flag: str, field: str, default: str, help_text: str, variable: str | None = None) -> Any:
    """An option of prefill and of decode. Not given, it is each service's own variable for `field`."""
    own = " and ".join(f"PRAD_{service}_{field}" for service in _COMPUTING)
    return typer.Option(flag, help=f"{help_text} If left out: {own}, or {default}.", envvar=variable)


def agreed(flag: str, field: str, value: str | None, default: str) -> str:
    """What both services take for `field`, which has to be the same. Raises BadParameter if it is not."""
    if value is not None:
        return value
    prefill, decode = (os.environ.get(f"PRAD_{service}_{field}", default) for service in _COMPUTING)
    if prefill != decode:
        raise typer.BadParameter(
            f"prefill would have {prefill!r} and decode {decode!r}, and they need the same: set "
            f"PRAD_PREFILL_{field} and PRAD_DECODE_{field} alike, or give {flag}",
            param_hint=flag,
        )
    return prefill


def given(flags: Mapping[str, object]) -> list[str]:
    """Those that were given: the others are the environment's, or the service's own default."""
    return [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]


def without_effect(own: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Which variables are set to what `own`, the flags that each service gets anyway, goes over."""
    for service, flags in own.items():
        for flag, value in flags.items():
            variable = f"PRAD_{service}_{flag.removeprefix('--').replace('-', '_')}".upper()
            if os.environ.get(variable, str(value)) != str(value):
                yield f"{variable}, as prad serve starts prad {service} with {flag} {value}"
