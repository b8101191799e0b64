"""Kinds of CPUs, and where their results lie."""

import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

RESULTS = Path(__file__).parent / "results"


def _loaded(path: Path) -> ModuleType:
    """A file by itself: importing its package takes seconds, and `--help` is to answer at once."""
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_CPUS = _loaded(Path(__file__).parents[1] / "prad" / "lm" / "kernels" / "cpus.py")

KINDS: tuple[str, ...] = tuple(kind.name for kind in _CPUS.KINDS)
"""Of CPUs, by what they multiply with, as kernels are built for them; figures of one say little about
another."""

_WITH_BF16 = ("amx", "avx512-bf16")

_FEW = 8


def cpu_flags() -> list[str]:
    """What this CPU has beyond its machine type, by Linux's names."""
    flags: list[str] = _CPUS.instructions()
    return flags


def cpu_kind() -> str:
    """This machine's, of KINDS, else "other": the folder of its results."""
    has, machine = set(cpu_flags()), platform.machine()
    return next((k.name for k in _CPUS.KINDS if k.machine == machine and k.needs <= has), "other")


def named_dtypes(sequences: int) -> dict[str, str]:
    """What torch's programs are asked in here, by so many sequences at once, and what that adds to the name
    of a row: float32, too, where bfloat16 is widened before it is multiplied. Who uses them on such a CPU
    takes the faster: for many rows that is float32, in a fifth of the time (`floor`)."""
    if cpu_kind() in _WITH_BF16:
        return {"bfloat16": ""}
    few = {"bfloat16": ", bfloat16"} if sequences <= _FEW else {}
    return few | {"float32": ", float32"}
