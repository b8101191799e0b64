"""Kinds of CPUs, and where their results lie."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KINDS = ("amx", "avx512-bf16", "avx512", "avx2")
"""Of CPUs, by what they multiply with; figures of one say little about another."""


def cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


def cpu_kind() -> str:
    """This machine's, of KINDS, else "other": the folder of its results."""
    named = dict(zip(KINDS, ("amx_bf16", "avx512_bf16", "avx512f", "avx2"), strict=True))
    flags = cpu_flags()
    return next((kind for kind, flag in named.items() if flag in flags), "other")
